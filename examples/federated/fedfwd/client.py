"""The app of a client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from layerwise import LayerwiseError

from .learning import Options, train

app = ClientApp()


@app.train()
def one_round(message: Message, context: Context) -> Message:
    """Train the server's arrays on this client's shard."""
    options = Options.of(context.run_config)
    client, clients = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    if clients != options.clients:
        raise LayerwiseError(f"the federation has {clients} nodes and the run {options.clients} clients; use one.")
    given = message.content["arrays"]
    found = train(options, client, int(message.content["config"]["server-round"]), given.to_torch_state_dict())
    arrays = ArrayRecord(found.arrays)
    metrics = MetricRecord(
        {
            "num-examples": found.samples,
            "client": client,
            "bytes-down": given.count_bytes(),
            "bytes-up": arrays.count_bytes(),
            "memory": found.memory,
            "work": found.work,
        }
    )
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
