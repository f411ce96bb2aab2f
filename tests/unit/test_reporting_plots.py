"""Figures: what is drawn is what the records say; files are real PNGs."""

import csv
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fedllm_flwr.data.partition import ClientStats
from fedllm_flwr.reporting import clients as client_figures
from fedllm_flwr.reporting import plots
from fedllm_flwr.reporting.clients import OTHER, clients_table, label_counts
from fedllm_flwr.tasks import find

RECORDS: list[dict[str, Any]] = [
    {"round": 0, "eval": {"loss": 2.5, "accuracy": 0.3, "macro_f1": 0.2}},
    {"round": 1, "loss": 2.0, "clients": {"a": {"loss": 1.5}, "b": {"loss": 2.5}}},
    {"round": 2, "loss": None, "clients": {}},
    {"round": 3, "loss": 1.0, "clients": {"b": {"loss": 1.0}}, "eval": {"loss": 1.25}},
]


def stats(name: str, **labels: int) -> ClientStats:
    return ClientStats(name, sum(labels.values()), labels, 12.25, 11.5, 40)


def pixels(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]  # (height, width, 3) in 0..1


def share_of(color: str, path: Path) -> float:
    """Part of a figure's pixels that have exactly this colour."""
    return float((np.abs(pixels(path) - to_rgb(color)).max(axis=-1) < 0.01).mean())


def test_losses_are_drawn_where_they_belong() -> None:
    axis = Figure().subplots()
    plots._plot_losses(axis, RECORDS, "nats/token")

    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {
        "training, mean of clients": [[1, 2.0], [3, 1.0]],
        "held-out records": [[0, 2.5], [3, 1.25]],
    }
    [band] = axis.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(1.0, 1.5), (1.0, 2.5), (3.0, 1.0)} <= corners


def test_accuracy_gets_a_panel_only_where_it_is_known(tmp_path: Path) -> None:
    plots.plot_curves(RECORDS, tmp_path / "with.png", "fedavg on demo", find("sft"))
    without = [{key: value for key, value in item.items() if key != "eval"} for item in RECORDS]
    plots.plot_curves(without, tmp_path / "without.png", "fedavg on demo", find("sft"))

    wide, narrow = pixels(tmp_path / "with.png"), pixels(tmp_path / "without.png")
    assert wide.shape[1] > 1.5 * narrow.shape[1]
    assert share_of(plots.PALETTE[2], tmp_path / "with.png") > 0  # macro F1
    assert share_of(plots.PALETTE[2], tmp_path / "without.png") == 0


@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_any_number_of_rounds_makes_a_figure(tmp_path: Path, count: int) -> None:
    records = [{"round": i, "loss": 1.0, "clients": {"a": {"loss": 1.0}}} for i in range(count)]
    plots.plot_curves(
        records, tmp_path / "curves.png", "$x_ \\frac a long title " * 20, find("sft")
    )

    assert pixels(tmp_path / "curves.png").std() > 0.01
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_sizes_are_stacked_by_label() -> None:
    axis = Figure().subplots()
    client_figures._plot_sizes(axis, [stats("a", x=1, y=2), stats("b", y=5, _z=7)])

    bars = [[(bar.get_x(), bar.get_width()) for bar in group] for group in axis.containers]
    assert bars == [[(0, 0), (0, 7)], [(0, 1), (7, 0)], [(1, 2), (7, 5)]]  # labels _z, x, y
    [legend] = axis.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_z", "x", "y"]


@pytest.mark.parametrize(
    "clients",
    [
        [stats("only", negative=3)],
        [ClientStats("unlabelled", 5, {"": 5}, 3.0, 3.0, 9)],
        [stats(f"hospital-of-the-north-and-the-islands-{i}", a=i + 1, b=2) for i in range(40)],
        [stats(f"client-{i}", a=i + 1) for i in range(150)],
        [stats("$a$b", **{f"label {i}": i for i in range(30)}), stats("_医院", a=1)],
        [stats("short", a=1), ClientStats("long", 1, {"a": 1}, 9.0, 9.0, 90_000)],
    ],
)
def test_any_clients_make_a_figure_without_warnings(
    tmp_path: Path, clients: list[ClientStats]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client_figures.plot_clients(clients, tmp_path / "clients.png")

    assert share_of(plots.PALETTE[0], tmp_path / "clients.png") > 0.0005


def test_comparison_names_every_curve(tmp_path: Path) -> None:
    curves = {f"algorithm-{i}": [(0, 2.0 + i, 1.9 + i, 2.1 + i), (5, 1, 1, 1)] for i in range(10)}
    plots.plot_comparison(curves, tmp_path / "compare.png")

    for color in plots.PALETTE:
        assert share_of(color, tmp_path / "compare.png") > 0


def test_a_line_that_lies_on_another_is_seen(tmp_path: Path) -> None:
    """FedProx with a small mu hid FedAvg: one solid line upon the other."""
    curve = [(i, 1.0 / (1 + i), 1.0 / (1 + i), 1.0 / (1 + i)) for i in range(13)]
    shares = {}
    for names in (["fedavg"], ["fedavg", "fedprox"]):
        plots.plot_comparison(dict.fromkeys(names, curve), tmp_path / "compare.png")
        shares[len(names)] = share_of(plots.PALETTE[0], tmp_path / "compare.png")
        assert share_of(plots.PALETTE[len(names) - 1], tmp_path / "compare.png") > 0
    assert shares[2] > 0.3 * shares[1]


def test_axis_is_logarithmic_where_the_start_flattens_the_rest() -> None:
    def curve(*means: float) -> Any:
        return np.array([(i, mean, mean, mean) for i, mean in enumerate(means)], dtype=float)

    assert plots._flattened([curve(2.9, 0.5, 0.43), curve(2.9, 0.6, 0.40)])
    assert not plots._flattened([curve(0.34, 0.8, 0.91)])  # an accuracy
    assert not plots._flattened([curve(-8.0, 0.5, 2.0)])  # margins have no logarithm
    assert not plots._flattened([])


def test_labels_of_lines_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends that coincide get names one above the other."""
    offsets: list[float] = []
    label_ends = plots._label_ends

    def measured(axis: Any, ends: Any) -> None:
        label_ends(axis, ends)
        offsets.extend(text.xyann[1] for text in axis.texts)  # points above the line's end

    monkeypatch.setattr(plots, "_label_ends", measured)
    curves = {f"rule-{i}": [(0, 2.0, 2, 2), (5, 1.0, 1, 1)] for i in range(9)}
    plots.plot_comparison(curves, tmp_path / "compare.png", caption="Lines: one seed.")
    assert len(offsets) == 9
    assert min(np.diff(sorted(offsets))) > 9  # points: a line of text of size 9
    assert sum(offsets) == pytest.approx(0, abs=1)  # as many above as below


def test_table_of_clients_holds_every_count() -> None:
    text = clients_table([stats("a,b", negative=3, positive=1), stats("c", neutral=2)])

    assert list(csv.DictReader(io.StringIO(text))) == [
        {
            "client": "a,b",
            "examples": "4",
            "label:negative": "3",
            "label:neutral": "0",
            "label:positive": "1",
            "mean_length": "12.2",
            "median_length": "11.5",
            "max_length": "40",
        },
        {
            "client": "c",
            "examples": "2",
            "label:negative": "0",
            "label:neutral": "2",
            "label:positive": "0",
            "mean_length": "12.2",
            "median_length": "11.5",
            "max_length": "40",
        },
    ]


def test_rare_labels_are_summed() -> None:
    clients = [stats("a", common=9, second=5, rare=1, rarer=1), stats("b", common=1, rare=2)]

    labels, counts = label_counts(clients, 3)
    assert labels == ["common", "second", OTHER]
    assert counts == [(9, 5, 2), (1, 0, 2)]


def test_matplotlib_is_imported_when_drawing_and_not_before() -> None:
    code = (
        "import sys, fedllm_flwr.reporting.plots, fedllm_flwr.reporting.console,"
        "fedllm_flwr.reporting.trackers, fedllm_flwr.reporting.card\n"
        "print([name for name in ('matplotlib', 'torch', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
