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

Files:

    the contract of a rule
        rule.py                what a rule reads (`Site`, `BatchContext`, `BlockContext`) and returns (`Signal`)
        pieces.py              optional base classes for the few rules that need more
        contract.py            checks what a rule returns, in one sentence each
        abstract.py            refuses a subclass that lacks a method
        ranges.py              ranges of options, declared by their type
        own_code.py            `FILE.py:NAME`, loaded and recognised
    the engine
        engine.py              the update order
        runner.py              forward passes of a group, and the rule's signals
        groups.py              blocks that are updated together
        execution.py           device, precision, clipping, accumulation; who else trains these blocks
        progress.py            an unfinished update, and what a pass records
        parts.py               a batch in parts
        phases.py              a batch that passes a block in two phases
        finite.py              non-finite losses and gradients
        further.py             terms of a loss that nothing trains
        reached.py             a signal that reaches nothing that learns
        failures.py            errors of a user's modules, with the block's name
        renewal.py             units with new weights, and the optimizer's state of these
        following.py           modules that follow the next block
        trees.py               tensors in nested containers
    optimizers
        optim.py               an optimizer per group, schedules, weight decay
        param_groups.py        the parameter groups of an optimizer
        xgrad.py               optimizers that look one step ahead
        stepping.py            an optimizer's step without its overhead on the host
        arrival.py             steps in the backward pass, one parameter at a time
    cutting a model
        cutting.py             the entry: as functions, or at the calls of its modules
        blocks.py              blocks and head of a model that is cut into functions
        chains.py              chains of modules, cut without a trace
        tracing.py             cuts of a traced graph
        layout.py              where batch, channels and positions are in an activation
        torch_functions.py     what torch's functions do to the dimensions of their arguments
        cost.py                the cost of blocks, and their even division
        output_layer.py        the linear layer that gives the network's outputs
        first_layer.py         the first layer of a block
        layers.py              inputs, outputs and gradients of the layers inside a block
        hidden_units.py        outputs of a layer that one other layer reads
        drawing.py             new weights for modules
        late.py                weights of a model on the meta device, made block by block
        modes.py               passes that leave no trace in a model
    a model cut at its calls
        calls.py               its partition: the forward pass, paused after every cut
        call_blocks.py         its blocks
        cut_names.py           the cuts, by pattern or automatically
        reading.py             what goes in, and where the tensors are in what comes out
        coroutine.py           the pass that pauses
        crossing.py            what each block uses of earlier ones
        ownership.py           which block trains a shared parameter
        keeping.py             tensors that a pass leaves in the modules
        observed.py            what a pass may read besides its tensors
        regular.py             blocks run on their own, in any order
        remote.py              blocks on other ranks
    mathematics
        functional.py          pure functions of the rules
        chunked.py             readouts with a large vocabulary, in chunks
        posteriors.py          distributions over the label, with closed forms
        pullback.py            cotangents through one block
        perturbation.py        random directions in the space of weights
        perturbed_layers.py    noise on the outputs of layers
        given.py               gradients that a rule computes itself
        once.py                backward passes without a second derivative
    data and machine
        tasks/                 what labels mean: losses and metrics
        augment.py             augmentation of a batch
        graphs.py              a graph as a part of a network
        randomness.py          draws that depend on what they are for
        devices.py             what the devices of torch have and lack
"""
