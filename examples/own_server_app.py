"""SCAFFOLD in a custom ServerApp, with the clients of this package.

    python examples/own_server_app.py

The strategy accepts overrides of the configuration and the algorithm's hyper-parameters, and
`start` the arguments of any Flower strategy. Flower's simulation runs ten clients on the embedded
data.
"""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedllm_flwr.client.app import app as client_app
from fedllm_flwr.federation.strategies import Scaffold

OVERRIDES = ["federation.sample_clients=2", "federation.client_cpus=1", "training.max_steps=4"]

app = ServerApp()


def norm(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """The global adapter's norm; a real function would evaluate it."""
    squares = [float((array.numpy() ** 2).sum()) for array in arrays.values()]
    return MetricRecord({"norm": sum(squares) ** 0.5})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Three rounds of SCAFFOLD."""
    strategy = Scaffold(OVERRIDES, eta=1.0)
    result = strategy.start(
        grid, strategy.initial_arrays(), num_rounds=3, timeout=600, evaluate_fn=norm
    )
    for server_round, metrics in result.train_metrics_clientapp.items():
        scored = result.evaluate_metrics_serverapp[server_round]
        print(f"round {server_round}: loss {metrics['loss']:.3f}, norm {scored['norm']:.3f}")


if __name__ == "__main__":
    run_simulation(app, client_app, num_supernodes=10)
