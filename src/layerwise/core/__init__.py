"""The core of layer-by-layer training: blocks, tasks, the contract of a rule, the engine.

Decisions:

- A group, not a block, is the engine's unit. Backpropagation is one group with everything, block-wise rules have one
  block per group, and a group of N blocks lies between.
- A block owns no module. It holds names and looks parameters up in the model.
- The rule answers, the engine acts. A rule is a frozen dataclass: comparable, printable, recorded in `config.json`,
  and its fields are options of the command line. Optional base classes serve the few rules that need more.
- Groups may be joined in an update, not parted. Optimizers belong to the groups of `Rule.groups`; an update that
  joins some of them steps all their optimizers, so that state and checkpoints know nothing of it.
- Groups may rest in an update. Such a group runs without a graph and without its optimizer; its state is kept.
- No draw depends on history. Seeds are hashes of (seed, purpose, step, block), so a checkpoint holds no generator.
- Nothing waits for the device inside a step. Metrics are tensors until they are read. The exceptions are the
  finite check on the CPU, `nonfinite="skip"`, and the gradient scaler's factor where fp16 meets a trunk.
- A rule must not read modules of earlier groups in `signal`: with replicas, those are updated one group later.
"""
