"""The trained weights of a run as a plain safetensors file, for the model's own class."""

from pathlib import Path

from layerwise.core.pieces import predicts_plainly
from layerwise.errors import LayerwiseError
from layerwise.files import shown
from layerwise.memory.tensorfile import save_file
from layerwise.replacements.replacing import loads_plainly
from layerwise.runs.building import DataSignature, load_run, read_state
from layerwise.runs.output import check_output, data_paths, output_file

OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".h5", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
"""Suffixes of files of weights in formats that are not written."""


def export(folder: Path, file: Path) -> tuple[str, list[str]]:
    """Write the weights of a run's newest checkpoint, of one or several ranks, under the model's own parameter names.

    Loading them does not need this library: `model.load_state_dict(load_file(file))`, with
    safetensors' `load_file`, fills a model of the class that was trained. The file's metadata says how inputs are made
    and what outputs mean (`safe_open(file, "pt").metadata()`), see `DataSignature.about_inputs`.

    Args:
        folder: folder of a run, finished or not.
        file: where to write; replaced in one step if it is a file; not in the folder of a run.

    Returns:
        A description of the file, and notes for the user: the run is not finished, a
        damaged checkpoint was skipped, the rule predicts with more than these weights.

    Raises:
        LayerwiseError: no run, no checkpoint that can be read, a file that cannot be written, or one whose name is
            that of another format.
    """
    check_output(file)  # before the work
    if file.suffix.lower() in OTHER_FORMATS:
        raise LayerwiseError(
            f"{shown(file)} would be a safetensors file, in spite of its name; give a name that ends in .safetensors."
        )
    options, state, notes = read_state(folder)
    weights = state["learner"]["model"]
    if "." in options.optimizer:  # some optimizers of other packages keep the weights for prediction themselves
        learner = load_run(folder, "cpu").learner
        learner.optimizer.eval()
        weights = learner.network.model.state_dict()
    with output_file(file, data_paths(options.data)) as partial:
        save_file(weights, partial, DataSignature.in_state(state).about_inputs)
    if not predicts_plainly(options.rule):
        notes.append(
            f"rule {options.rule.name!r} predicts with more than the network's own weights, which is all that {file} "
            "holds; its accuracy is that of layerwise predict and eval"
        )
    if changed := [name for name in options.replace if not loads_plainly(name)]:
        notes.append(
            f"the run has --replace {' '.join(changed)}, so the weights predict the same only in a network with it: "
            f"layerwise.replace(model, {changed}) before they are loaded"
        )
    numbers = sum(tensor.numel() for tensor in weights.values())
    return f"{shown(file)}: {len(weights)} tensors, {numbers:,} numbers, of step {state['learner']['steps']}", notes
