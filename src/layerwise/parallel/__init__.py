"""Blocks on several ranks: rendezvous, agreement, messages, replicas, shards, stages, and who has failed.

`Engine.update` takes a detached input, gives a detached output, and needs nothing else from other groups. So a rank
of a pipeline is an ordinary `Learner` with a `Stage`: it has the groups of its range, begins with the input that the
previous rank sent, and sends on the output of its last group. Engine and rules know nothing of ranks. Draws depend on
(seed, step, block) and labels on (seed, epoch, batch), so neither is sent.

Decisions:

- The parameters of other ranks become tensors without memory (`meta`), so that names, shapes and checkpoints stay
  those of the whole network.
- A thread reads ahead, because gloo delivers a message only once a buffer waits for it.
- Ranks agree, and announce why they fail, through torchrun's store, which outlives each of them. Each restart has its
  own keys there. Every call on the store has a time limit, and its values are JSON, never pickles. A rank that fails
  exits at once (`os._exit`), because a thread may be blocked on a rank that is gone.
- Replicas have one hook in the engine: `Execution.replicas` starts to average a group's gradients after its backward
  pass, and the group steps while the next one runs forward.
- Sharding is the same hook. Blocks run with gathered parameters (`full_of`), the optimizer has ordinary tensors that
  show this rank's share (`shard_of`), a group runs inside `resident`, and states are laid out as shares (`to_shard`,
  `to_full`). `fully_shard` needs one root module, but a group spans several, so a module wraps the model and ignores
  all other parameters; it never runs. `unshard` and `reshard` are called around the group, because a rule uses blocks
  and auxiliary modules in its own order.
- Pipelines side by side are a `Stage` and the `Replicas` of its column in one learner. Checkpoints are those of the
  first pipeline, because all rows hold the same bits.
- Not in this version: sharded stages, and a rule with a trunk in a pipeline (the ranks would have to send gradients
  back to the first).

Files:

    rendezvous.py      how the processes of a job find one another
    ranks.py           their agreement, and which of them has failed
    heartbeat.py       which replica has ended or hangs
    serialization.py   values as JSON
    transport.py       tensors from rank to rank
    stage.py           a rank of a pipeline
    following.py       tensors of the next block, from the next rank
    replicas.py        the same blocks on several ranks
    shards.py          a part of every parameter on each rank
    alone.py           null objects for one process
"""
