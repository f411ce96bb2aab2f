"""Wrong inputs to every command, what each says, and the directory that they are typed in.

``tests/integration/test_errors.py`` types them in one process, ``scripts/measure_errors.py`` each
in a process of its own; ``docs/errors.md`` is made of them.
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.models.tokenizer import model_source
from tiny_runs import run_tiny, tiny

BASE = tiny("federation.engine=inprocess")
DATA = "data=jsonl data.path="
PAIRS = "task=dpo data=preferences data.path="
OWN = "model=custom model.path=./"
INIT = "site init site --name ant --data notes.jsonl --server fl.example.org:9092"


@dataclass(frozen=True)
class WrongInput:
    """What is wrong, what the user typed after ``fedllm``, and a part of what they read.

    Args:
        status: exit status; 2 is wrong use.
    """

    what: str
    typed: str
    says: str
    status: int = 2

    @property
    def arguments(self) -> list[str]:
        """The command line; a run gets the small settings of `BASE`, where it says nothing else."""
        typed = shlex.split(self.typed)
        if typed[:1] != ["run"] or any(text.startswith("resume=") for text in typed):
            return typed
        given = {text.partition("=")[0] for text in typed}
        fitting = [text for text in BASE if text.partition("=")[0] not in given]
        return ["run", "--quiet", *fitting, *typed[1:]]


def _rows(command: str, *rows: tuple[str, str, str]) -> list[WrongInput]:
    return [WrongInput(what, f"{command} {typed}".strip(), says) for what, typed, says in rows]


COMMANDS = _rows(
    "",
    ("misspelt command", "trian", "Did you mean 'fedllm run'"),
    ("another program's command", "evalute", "Did you mean 'fedllm evaluate'"),
    ("no command", "", "missing command"),
    ("option for a key", "run --num-rounds 3", "Did you mean federation.num_rounds=3"),
    ("option for a key, with =", "run --lr=1e-4", "Did you mean training.learning_rate=1e-4"),
    ("misspelt option", "run --mutlirun seed=1,2", "Did you mean --multirun"),
    ("unknown option", "run --zzzz", "fedllm run --help lists"),
    ("an argument too many", "merge a b c", "'c' is one argument too many"),
    ("missing arguments", "generate", "missing run, prompt"),
    ("misspelt step", "server strat", "has no step 'strat'"),
    ("nothing listed", "config --list foo", "--list foo: no group or key has this in it"),
    ("missing groups", "config --config-dir nowhere", "--config-dir nowhere: no such directory"),
    ("misspelt option of doctor", "doctor --quik", "Did you mean --quick"),
    ("status of nothing", "status", "give the directory of a run"),
    ("status of a missing directory", "status nowhere", "nowhere: no such directory"),
    ("status of another directory", "status folder", "folder"),
    ("metrics of nothing", "metrics", "fedllm metrics: missing directory"),
)
KEYS = _rows(
    "run",
    ("misspelt key", "training.learning_rat=1e-4", "Did you mean 'training.learning_rate'"),
    ("misspelt choice", "algorithm=scafold", "Did you mean 'scaffold'"),
    ("wrong type", "federation.num_rounds=many", "federation.num_rounds"),
    ("learning rate of zero", "training.learning_rate=0", "training.learning_rate must be > 0"),
    ("empty batch", "training.batch_size=0", "training.batch_size must be > 0"),
    ("negative seed", "seed=-1", "seed must be >= 0"),
    ("dropout above 1", "lora.dropout=1.5", "lora.dropout must be"),
    ("no steps", "training.max_steps=0", "training.max_steps must be >= 1"),
    ("no records", "data.max_samples=0", "data.max_samples must be > 0"),
    ("unknown dtype", "training.dtype=float8", "training.dtype=float8"),
    ("key that is there", "+seed=1", "every key is there already"),
    ("two values", "seed=1 seed=2", "seed=1 and seed=2 exclude each other"),
    ("open list", "data.labels=[a", "write lists as data.labels=[a,b]"),
    ("list without --multirun", "algorithm=fedavg,fedprox", "add --multirun"),
    ("sweep of one", "--multirun seed=1", "--multirun needs a key with several values"),
    ("value twice in a sweep", "--multirun seed=1,1", "seed=1,1 lists 1 twice"),
    ("two quantizations", "quantization=int8 quantization=nf4", "keep one"),
    (
        "minimal learning rate above the first",
        "training.min_learning_rate=0.1",
        "training.min_learning_rate=0.1 is above training.learning_rate=0.005; lower it",
    ),
    ("settings of no algorithm", "'compare.settings={fedpox: {mu: 1}}'", "Did you mean 'fedprox'"),
    ("saved configuration that is missing", "config=nowhere.yaml", "config=nowhere.yaml: no such"),
    ("packing of pairs", "task=dpo training.packing=true", "works with task=sft only"),
    ("misspelt loss", "task=dpo dpo.loss_type=sigmod", "Did you mean 'sigmoid'"),
    (
        "label smoothing that nothing uses",
        "task=dpo dpo.label_smoothing=0.1",
        "no effect on dpo.loss_type=sigmoid; use one of robust",
    ),
    (
        "quantization where there is none",
        "quantization=int8 training.device=mps",
        "training.device",
    ),
    ("int8 with DoRA", "quantization=int8 lora.dora=true", "lora.dora=true"),
    (
        "deployment without its number of sites",
        "federation.engine=deployment federation.num_clients=null",
        "federation.num_clients=<sites to wait for>",
    ),
    ("deployment as a run", "federation.engine=deployment", "runs on a SuperLink"),
    ("tracker that is not installed", "tracking.wandb=true", "wandb is not installed"),
)
CLIENTS = _rows(
    "run",
    (
        "more sampled than there are clients",
        "federation.num_clients=3 federation.sample_clients=4",
        "sample at most all of them",
    ),
    ("more clients than records", "federation.num_clients=101", "the 100 training records"),
    ("more clients asked for than there are", "federation.min_clients=4", "min_clients=4 exceeds"),
    ("more replies than are sampled", "federation.min_replies=3", "min_replies=3 exceeds the 2"),
    (
        "more clients asked for than the column has values",
        "partition=natural federation.num_clients=null federation.min_clients=12",
        "federation.min_clients=12 exceeds federation.num_clients=10",
    ),
    (
        "more replies than the column has values",
        "partition=natural federation.num_clients=null federation.sample_clients=null "
        "federation.min_replies=9",
        "federation.min_replies=9 exceeds the 4 clients sampled",
    ),
    (
        "other number of clients than values",
        "partition=natural federation.num_clients=2",
        "divide evenly among 2 clients: partition=iid",
    ),
    (
        "missing column to divide by",
        f"{DATA}notes.jsonl partition=natural partition.column=ward",
        "partition.column=ward",
    ),
    (
        "nothing to divide by",
        f"{DATA}notes.jsonl partition=dirichlet",
        "partition=dirichlet needs a column of classes",
    ),
    (
        "more classes than there are",
        "partition=pathological partition.column=output partition.classes_per_client=9",
        "partition.classes_per_client=9",
    ),
    ("more CPUs than there are", "federation.client_cpus=1000", "set federation.client_cpus="),
    ("share of a GPU without one", "federation.client_gpus=0.5", "federation.client_gpus=0"),
    (
        "Ray cluster that is not there",
        "federation.engine=ray federation.ray_address=127.0.0.1:1",
        "federation.ray_address=127.0.0.1:1: no Ray cluster answers there",
    ),
)
RECORDS = _rows(
    "run",
    ("missing file", f"{DATA}note.jsonl", "Did you mean 'notes.jsonl'"),
    ("empty file", f"{DATA}empty.jsonl", "empty.jsonl: the file is empty"),
    ("directory without records", f"{DATA}folder", "folder"),
    ("unknown format", f"{DATA}notes.xml", "unknown extension '.xml'"),
    ("line that is no JSON", f"{DATA}broken.jsonl", "broken.jsonl, line 3"),
    ("object for a list", f"{DATA}object.json", "holds one JSON object, not a list"),
    ("Parquet that is none", f"{DATA}broken.parquet", "not a readable parquet file"),
    ("UTF-16", f"{DATA}utf16.jsonl", "iconv -f utf-16 -t utf-8"),
    ("Latin-1", f"{DATA}latin1.jsonl", "iconv -f latin1 -t utf-8"),
    ("semicolons", f"{DATA}semicolons.csv", "use ';' as separator"),
    ("two columns of one name", f"{DATA}twice.csv", "2 columns are called 'output'"),
    ("two values for one name", f"{DATA}twice.jsonl", "two values for 'output'"),
    ("records that are all bad", f"{DATA}all_bad.jsonl", "none of its 12 records can be used"),
    ("one column for both", f"{DATA}notes.jsonl data.columns.output=instruction", "same column"),
    ("missing column", f"{DATA}notes.jsonl data.columns.output=reply", "columns: input"),
    ("scores on what is learnt", f"{DATA}notes.jsonl data.eval_path=notes.jsonl", "is data.path"),
    ("missing held-out file", "data.eval_path=nowhere.jsonl", "data.eval_path=nowhere.jsonl"),
    (
        "records that are all too long",
        "training.max_length=16",
        "training.max_length=16 with data.truncation=right leaves no example of any client",
    ),
    (
        "labels of other records",
        f"{DATA}notes.jsonl data.labels=[good,bad]",
        "data.labels=[good,bad]: no held-out record has one of them as its answer",
    ),
    ("pairs without a column", f"{PAIRS}one_sided.jsonl", "data.columns.rejected=rejected"),
    ("instructions for DPO", f"{PAIRS}notes.jsonl", "not preference pairs; use task=sft"),
    ("pairs for SFT", f"{DATA}pairs.jsonl", "not instructions; use task=dpo"),
    ("pairs without a difference", f"{PAIRS}equal.jsonl", "chosen equals rejected in all"),
)
MODELS = _rows(
    "run",
    ("model that is nowhere", f"{OWN}modle", "'model'"),
    ("directory that is no model", f"{OWN}folder", "config.json"),
    ("hub model without a network", "model=llama3_2_1b", "model.path="),
    ("tokenizer without end token", f"{OWN}no_eos", "eos_token"),
    ("tokenizer with more ids than the model", f"{OWN}short_vocabulary", "its tokenizer produces"),
    ("no tokenizer", f"{OWN}no_tokenizer", "its tokenizer cannot be loaded"),
    ("no chat template", f"{OWN}no_template data.template=chat", "no chat template"),
    ("no weights", f"{OWN}no_weights", "no *.safetensors there"),
    ("weights cut short", f"{OWN}cut_weights", "model.safetensors cannot be read"),
    ("weights of another model", f"{OWN}other_weights", "not those of its config.json"),
    ("weights with NaN", f"{OWN}nan_weights", "its weights hold NaN or Inf, first in"),
    ("model that reads in both directions", f"{OWN}bert", "reads a text in both directions"),
    ("texts longer than the model takes", "training.max_length=1024", "takes 512 tokens"),
    ("short context", f"{OWN}short_context", "takes 128 tokens; set training.max_length=128"),
    ("no layer of that name", "lora.target_modules=[c_attn]", "c_attn matches no layer"),
    ("misspelt layer", "lora.target_modules=[q_prj]", "Did you mean 'q_proj'"),
    ("rank above the width", "lora.r=4096 lora.target_modules=[q_proj]", "lora.r=4096 is above"),
    ("no such device", "training.device=cuda", "training.device=cuda"),
    ("FlashAttention without CUDA", "model.attention=flash_attention_2", "flash_attention_2"),
    ("fused kernels without CUDA", "model.kernels=liger", "model.kernels=liger needs a CUDA"),
    ("misspelt suite", "evaluation.suites=[finence]", "Did you mean 'finance'"),
    ("suite that runs code", "evaluation.suites=[code]", "runs code or uses a judge"),
    (
        "suite without its files",
        "evaluation.suites=[finance] evaluation.data_root=folder",
        "holds the files of no task of finance",
    ),
    ("adapter of another shape", "init_adapter=finished/adapter lora.r=4", "lora.r=4, but"),
    ("init_adapter that is none", "init_adapter=folder", "adapter_config.json"),
    (
        "reference that is no adapter",
        "task=dpo dpo.reference_adapter=folder",
        "dpo.reference_adapter=folder: no adapter_config.json",
    ),
    (
        "reference of another shape",
        "task=dpo dpo.reference_adapter=finished/adapter lora.r=4",
        "lora.r=4, but",
    ),
)
DIRECTORIES = _rows(
    "run",
    ("directory of another run", "output_dir=finished", "resume=finished"),
    ("directory with other files", "output_dir=folder", "holds other files (letter.txt)"),
    ("directory that cannot be", "output_dir=notes.jsonl/run", "Give another"),
    ("rounds to keep", "checkpoint.adapters=every:0", "checkpoint.adapters"),
    ("going on with nothing", "resume=nowhere", "resume=nowhere: no such file or directory"),
    ("going on with another directory", "resume=folder", "holds no run"),
    ("going on with another option", "resume=finished lora.r=4", "lora.r=4: the run in"),
)
COMPARE = _rows(
    "compare",
    ("seeds as a list", "seeds=1,2,3", "seeds=3 with seed=1 runs the seeds 1, 2 and 3"),
    ("seeds as a sweep", "seed=1,2", "seeds=3 with seed=1"),
    ("another sweep", "lora.r=4,8", "a comparison takes one value"),
    ("misspelt algorithm", "algorithm=fedpox", "algorithm=fedpox"),
    ("going on with nothing", "resume=folder", "no compare.json there"),
    ("directory with other files", "output_dir=folder", "holds other files (letter.txt)"),
    ("model that reads in both directions", f"{OWN}bert", "reads a text in both directions"),
)
ADAPTERS = [
    *_rows(
        "generate",
        ("missing run", "nowhere Hello", "nowhere: no such directory"),
        ("no run", "folder Hello", "folder: holds no run"),
        ("no tokens", "finished Hello --max-new-tokens 0", "--max-new-tokens must be > 0"),
        ("round that is not kept", "finished@round=99 Hello", "round 99 is not kept"),
        ("misspelt choice", "finished@bset Hello", "names no adapter"),
    ),
    *_rows(
        "merge",
        ("missing run", "nowhere merged", "nowhere: no such directory"),
        ("no run", "folder merged", "folder: holds no run"),
        ("output that exists", "finished folder", "folder exists"),
        ("output below a file", "finished notes.jsonl/merged", "notes.jsonl is a file"),
    ),
    *_rows(
        "tune",
        ("no trials", "--trials 0", "--trials must be > 0"),
        ("range upside down", "--range 0.1 0.01", "give 0 < LOW < HIGH"),
        ("misspelt algorithm", "algorithm=fedpox", "algorithm=fedpox: choose all"),
    ),
    *_rows(
        "reproduce",
        ("misspelt experiment", "finence", "Did you mean 'finance'"),
        ("no seeds", "finance --seeds 0", "--seeds must be > 0"),
    ),
    *_rows(
        "export",
        ("no target", "finished out", "missing --to"),
        ("missing run", "nowhere out --to peft", "nowhere: no such directory"),
        ("output that exists", "finished folder --to peft", "folder exists"),
        ("no converter", "finished out --to gguf --converter nowhere.py", "no such file"),
        ("no repository", "finished out --to hub", "give OWNER/NAME"),
    ),
    *_rows("audit", ("no run", "folder", "folder: holds no run")),
    *_rows("report", ("no run", "folder", "folder: neither a run (config.yaml)")),
    *_rows("watch", ("no run", "folder", "folder: neither a run (config.yaml)")),
]
EVALUATE = _rows(
    "evaluate",
    ("nothing to score on", "--base embedded", "give --suite"),
    ("misspelt suite", "--base embedded --suite finence", "Did you mean 'finance'"),
    ("misspelt task", "--base embedded --task fpbb", "--task fpbb: no such task"),
    ("no number", "--base embedded --limit many", "--limit: invalid int value: 'many'"),
    ("limit of zero", "--base embedded --suite finance --limit 0", "--limit must be > 0"),
    (
        "two choices of examples",
        "--base embedded --suite finance --limit 50 --subset 50",
        "or --subset (drawn), not both",
    ),
    ("negative shots", "--base embedded --suite finance --shots=-1", "--shots must be >= 0"),
    ("misspelt prompt", "--base embedded --suite finance --prompt chta", "Did you mean 'chat'"),
    ("misspelt template", "--base embedded --suite finance --template alpacca", "choose from"),
    ("missing data", "--base embedded --suite finance --data-root nowhere", "no such directory"),
    ("data without files", "--base embedded --suite finance --data-root folder", "no task can be"),
    ("missing run", "--run nowhere --suite finance", "nowhere: no such directory"),
    ("no adapter", "--adapter folder --base embedded --suite finance", "folder"),
    ("no comparison", "--compare folder --suite finance", "no compare.json"),
    ("missing model", "--base ./nowhere --suite finance", "./nowhere"),
    (
        "no chat template",
        "--base ./no_template --suite finance --prompt chat",
        "--prompt chat: the tokenizer of ./no_template has no chat template; use --prompt trained",
    ),
    ("file for a directory", "--base embedded --suite finance --output notes.jsonl", "is a file"),
    ("other files", "--base embedded --suite finance --output folder", "holds other files"),
)
OPERATORS = [
    *_rows(
        "server",
        ("no host", "init server", "missing --host"),
        ("port out of range", "init server --host fl.example.org --port-base 70000", "give 1 to"),
        ("host that is none", "init server --host 'a b'", "a b"),
        ("directory that exists", "init folder --host fl.example.org", "folder"),
        ("run without a server", "run folder federation.num_clients=2", "fedllm server init"),
        ("key without a server", "register folder ant.pub", "fedllm server init"),
        ("name without a server", "unregister folder ant", "fedllm server init"),
        ("certificate without a server", "renew folder", "fedllm server init"),
    ),
    *_rows(
        "",
        ("site without --ca", INIT, "--ca is missing"),
        ("encryption and none", f"{INIT} --insecure --ca ca.crt", "exclude each other"),
        (
            "missing data of a site",
            INIT.replace("notes.jsonl", "nowhere.jsonl") + " --insecure",
            "nowhere.jsonl",
        ),
        ("address without a port", INIT.replace(":9092", "") + " --insecure", "give host:port"),
        ("name that is none", INIT.replace("ant", "'a/b'") + " --insecure", "--name"),
        ("column without a role", f"{INIT} --insecure --column foo", "--column foo"),
        ("misspelt device", f"{INIT} --insecure --device gpuu", "--device gpuu: no such device"),
        ("no model", f"{INIT} --insecure --model-path folder", "--model-path folder"),
        ("port out of range", f"{INIT} --insecure --health-port 70000", "--health-port 70000"),
    ),
]
WRONG_INPUTS = {
    "Commands and options": COMMANDS,
    "Keys and values": KEYS,
    "Clients": CLIENTS,
    "Records": RECORDS,
    "Models and adapters": MODELS,
    "Directories": DIRECTORIES,
    "Comparisons": COMPARE,
    "Adapters put to use": ADAPTERS,
    "Evaluation": EVALUATE,
    "Servers and sites": OPERATORS,
}


def make_place(place: Path) -> None:
    """Fill a user's directory with what the wrong inputs are about."""
    _write_records(place)
    (place / "folder").mkdir()
    (place / "folder" / "letter.txt").write_text("Not a run.")
    _write_models(place)
    run_tiny(place / "finished")


def _write_records(place: Path) -> None:
    notes = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(12)]
    lines = [json.dumps(note) for note in notes]
    text = "\n".join(lines)
    (place / "notes.jsonl").write_text(text)
    (place / "notes.xml").write_text("<notes/>")
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    (place / "object.json").write_text('{"records": 3}')
    (place / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (place / "utf16.jsonl").write_text(text, encoding="utf-16")
    (place / "latin1.jsonl").write_bytes('{"instruction": "Caf\u00e9?"}'.encode("latin-1"))
    (place / "semicolons.csv").write_text("instruction;output\nSay 1.;1\n")
    (place / "twice.csv").write_text("instruction,output,output\nSay 1.,1,2\n")
    twice = '{"instruction": "Say 1.", "output": "1", "output": "2"}'
    (place / "twice.jsonl").write_text("\n".join([*lines, twice]))
    bad = [json.dumps({"instruction": 3, "output": i}) for i in range(12)]
    (place / "all_bad.jsonl").write_text("\n".join(bad))
    for file, answers in {
        "pairs": {"chosen": "Yes, {}.", "rejected": "No {}"},
        "one_sided": {"chosen": "Yes, {}."},
        "equal": {"chosen": "{}", "rejected": "{}"},
    }.items():
        pairs = [
            {"prompt": f"Is it {i}?"} | {side: text.format(i) for side, text in answers.items()}
            for i in range(12)
        ]
        (place / f"{file}.jsonl").write_text("\n".join(map(json.dumps, pairs)))


def _write_models(place: Path) -> None:
    """Copies of the embedded model with one thing wrong each."""
    source = Path(model_source(ModelConfig()))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(source, place / name))

    copy("model")
    for missing in ("eos", "pad"):
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (source / file).is_file():
                _change(
                    copy_once(place, source, f"no_{missing}") / file, **{f"{missing}_token": None}
                )
    template = copy("no_template")
    (template / "chat_template.jinja").unlink()
    _change(template / "tokenizer_config.json", chat_template=None)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy_once(place, source, "no_tokenizer") / file).unlink()
    (copy("no_weights") / "model.safetensors").unlink()
    cut = copy("cut_weights") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100_000])
    _change(copy("other_weights") / "config.json", intermediate_size=64)
    _change(copy("short_context") / "config.json", max_position_embeddings=128)
    _rewrite(copy("short_vocabulary"), "model.embed_tokens.weight", lambda weight: weight[:300])
    _change(place / "short_vocabulary" / "config.json", vocab_size=300)
    name = "model.layers.1.self_attn.q_proj.weight"
    _rewrite(copy("nan_weights"), name, lambda weight: np.full_like(weight, np.nan))
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (copy_once(place, source, "bert") / file).unlink()
    _write_bert(place / "bert")


def copy_once(place: Path, source: Path, name: str) -> Path:
    """The copy of a model under this name, made by the first call."""
    folder = place / name
    return folder if folder.is_dir() else Path(shutil.copytree(source, folder))


def _change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    settings = json.loads(file.read_text())
    settings |= values
    file.write_text(json.dumps({key: v for key, v in settings.items() if v is not None}))


def _rewrite(folder: Path, name: str, change: Any) -> None:
    """Change one tensor of a model, all of which become float32."""
    import torch
    from safetensors.torch import load_file as load_torch

    file = folder / "model.safetensors"
    tensors = {key: value.to(torch.float32).numpy() for key, value in load_torch(file).items()}
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, file, {"format": "pt"})
    assert name in load_file(file)


def _write_bert(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=2048, intermediate_size=64, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
