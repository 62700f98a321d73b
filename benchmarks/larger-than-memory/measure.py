"""Resident memory and seconds per step of a Llama of a billion parameters that is never in memory as a whole.

    python benchmarks/larger-than-memory/measure.py [--folder FOLDER] [--steps 4] [--rules local_ce,sll]

Every run is a process of its own, or two. The model is made on the meta device, each block when it is first needed;
blocks and optimizer state are offloaded to disk; the trained weights are written block by block. Memory is the
high-water mark of the resident set that Linux reports (VmHWM), pages of mapped files included, from the start of Python
to the end. The text is that of this project's own documentation, byte by byte. The figures go to `results.jsonl`
beside this file; 45 GiB of disk are needed in the folder.
"""

import argparse
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

VOCABULARY = 256  # bytes: a readout per block has 0.5 million weights, a block 63 million
SIZES = {"width": 2048, "inner": 8192, "heads": 32, "keys": 16, "depth": 16}


def model_of(library: str):
    """The model without memory, what fills a module, and its cuts."""
    import torch

    with torch.device("meta"):
        if library == "torch":
            from llama import Llama, fill

            return Llama(VOCABULARY, **SIZES), fill, "layers.*", "tokens"
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=SIZES["width"],
            intermediate_size=SIZES["inner"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["keys"],
            num_hidden_layers=SIZES["depth"],
            use_cache=False,
        )
        return LlamaForCausalLM(config), None, "model.layers.*", "input_ids"


def high_water() -> int:
    """Most bytes that were ever resident, as Linux counts them."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return max(int(found[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def train(options: argparse.Namespace) -> dict:
    """One process, or one rank of two: build, train, save."""
    import torch

    from layerwise import LanguageModel, Learner

    torch.set_num_threads(options.threads)
    text = b"".join(path.read_bytes() for path in sorted(HERE.parents[1].glob("docs/*.md")))
    model, fill, cuts, name = model_of(options.library)
    draw = torch.Generator().manual_seed(0)

    def batch() -> dict:
        starts = torch.randint(len(text) - options.length, (options.samples,), generator=draw).tolist()
        tokens = torch.tensor([list(text[start : start + options.length]) for start in starts])
        return {name: tokens, "labels": tokens}

    stage = ranks = None
    if options.ranks > 1:
        from layerwise.parallel.ranks import Ranks
        from layerwise.parallel.stage import Stage
        from layerwise.parallel.transport import PipelineLink

        ranks = Ranks(1800, torch.device("cpu"))
        stage = Stage(ranks.rank, ranks.count, [SIZES["depth"] // ranks.count] * ranks.count)
    began = time.perf_counter()
    learner = Learner(
        model,
        options.rule,
        cuts=cuts,
        task=LanguageModel(),
        lr=3e-4,
        weights=fill,
        offload="disk",
        offload_folder=options.folder,
        stage=stage,
        example=batch(),
    )
    found: dict = {"build_seconds": time.perf_counter() - began, "build_peak": high_water()}
    link = PipelineLink(ranks, stage, stage.blocks) if stage is not None and ranks is not None else None
    seconds, losses = [], []
    for _ in range(options.steps):
        began = time.perf_counter()
        metrics = learner.step(batch())
        seconds.append(time.perf_counter() - began)
        losses.append({block: float(values["loss"]) for block, values in metrics.blocks.items() if "loss" in values})
        print(
            f"step {len(seconds)}: {seconds[-1]:.1f} s, {high_water() / 2**30:.2f} GiB, {losses[-1]}", file=sys.stderr
        )
    found |= {"step_seconds": seconds, "losses": losses, "step_peak": high_water()}
    began = time.perf_counter()
    learner.save_weights(options.out)
    if link is not None:
        link.__exit__(None)
    own = [p for group in learner.groups for p in group.parameters]
    state = [t for o in (o for g in learner.groups for o in g.optimizers) for s in o.state.values() for t in s.values()]
    return found | {
        "save_seconds": time.perf_counter() - began,
        "rule": options.rule,
        "ranks": options.ranks,
        "rank": 0 if ranks is None else ranks.rank,
        "blocks": "all" if stage is None or ranks is None else stage.blocks[ranks.rank],
        "library": options.library,
        "threads": options.threads,
        "tokens": options.samples * options.length,
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "readout_parameters": sum(p.numel() for p in learner.auxiliary.parameters()),
        "held_bytes": sum(t.nbytes for t in (*own, *state)),
        "peak": high_water(),
    }


def measure(options: argparse.Namespace, rule: str, ranks: int) -> list[dict]:
    """The figures of a run in processes of its own, one per rank."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        words = [f"--rule={rule}", f"--ranks={ranks}", f"--folder={folder}", f"--out={folder}/weights"]
        words += [f"--{n}={getattr(options, n)}" for n in ("steps", "samples", "length", "threads", "library")]
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", *words],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            )
            for rank in range(ranks)
        ]
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit(f"{rule} with {ranks} ranks has failed")
        stored = sum(path.stat().st_size for path in Path(folder, "weights").glob("*.safetensors"))
        files = len([*Path(folder, "weights").glob("*.safetensors")])
        shutil.rmtree(Path(folder, "weights"))
    return [json.loads(text.splitlines()[-1]) | {"saved_bytes": stored, "saved_files": files} for text in said]


def main() -> None:
    """Measure, write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", default="local_ce,sll")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--library", default="torch", choices=("torch", "transformers"))
    parser.add_argument("--processes", default="1,2", help="numbers of ranks to measure")
    parser.add_argument("--folder", default=".", help="on the disk to offload to")
    for hidden in ("--rule", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(options)))
        return
    import evidence
    import recording

    command = recording.command_of(__file__)
    for ranks in map(int, options.processes.split(",")):
        for rule in options.rules.split(","):
            rows = measure(options, rule, ranks)
            packages = ["transformers"] if options.library == "transformers" else []
            evidence.keep(HERE, f"{options.library}, {rule}, {ranks}", rows, command, packages)


if __name__ == "__main__":
    main()
