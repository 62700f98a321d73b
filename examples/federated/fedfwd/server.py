"""The app of the server: Flower's FedAvg, and a table with a row per round."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from layerwise import LayerwiseError

from .learning import Options, accuracy, arrays_of, dataset, make_learner

FIGURES = ("bytes-down", "bytes-up", "memory", "work")

app = ServerApp()


class OrderedFedAvg(FedAvg):
    """Flower's FedAvg over the replies in the order of the clients, so that every run gives the same bits."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found = list(replies)
        for reply in found:
            if reply.has_error():  # Flower's own FedAvg would leave it out of the average
                raise LayerwiseError(f"a client has failed in round {server_round}: {reply.error.reason}")
        found.sort(key=lambda reply: reply.content["metrics"]["client"])
        return super().aggregate_train(server_round, found)


def averaging(options: Options) -> FedAvg:
    """FedAvg over all clients, weighted by the sizes of their shards."""
    return OrderedFedAvg(
        fraction_evaluate=0.0,  # the server evaluates
        min_train_nodes=options.clients,
        min_available_nodes=options.clients,
        train_metrics_aggr_fn=largest,
    )


def largest(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    """The largest figure of any client."""
    return MetricRecord({name: max(reply["metrics"][name] for reply in replies) for name in FIGURES})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average over all clients in every round, evaluate, print the table."""
    options = Options.of(context.run_config)
    if options.out and not Path(options.out).parent.is_dir():
        raise LayerwiseError(f"cannot write {options.out}: there is no folder {Path(options.out).parent}.")
    print(f"data: {dataset(options.data, options.train_samples).name}")
    result = averaging(options).start(
        grid,
        ArrayRecord(arrays_of(make_learner(options, options.seed))),
        num_rounds=options.rounds,
        evaluate_fn=lambda number, arrays: MetricRecord({"accuracy": accuracy(options, arrays.to_torch_state_dict())}),
    )
    rows = []
    print("round   test accuracy   MiB down   MiB up   training peak, MiB   of it grad. + act., MiB   (per client)")
    for number, found in result.evaluate_metrics_serverapp.items():
        row = {"round": number, **found, **result.train_metrics_clientapp.get(number, {})}
        rows.append(row)
        mib = [f"{row[name] / 2**20:.3f}" if name in row else "-" for name in FIGURES]
        print(f"{number:5}{row['accuracy']:16.4f}{mib[0]:>11}{mib[1]:>9}{mib[2]:>21}{mib[3]:>26}", flush=True)
    if options.out:
        told = {name: value for name, value in asdict(options).items() if name != "out"}
        Path(options.out).write_text(json.dumps({"options": told, "rounds": rows}, indent=2) + "\n")
