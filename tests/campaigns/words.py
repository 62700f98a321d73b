"""Invalid words: mutated options, recipes and records of runs."""

import json
import random
import shutil
import time
from pathlib import Path

from campaigns.sandbox import Tally, command, inside, listing

PROMISE = (
    "Whatever the options, recipes and records of a run say: one sentence and exit code 2, or what was asked for; "
    "never a traceback, a hang, or a file outside of the run's folder."
)
SEEDS = [
    "train --steps 1 --model.width 8 --threads 1",
    "train --steps 2 --rule sid --rule.alpha 0.5 --lr 1e-3 --model.width 8 --threads 1",
    "train --steps 1 --rule local_ce --model vgg --model.width 4 --data digits --batch-size 64 --threads 1",
    "train --steps 1 --recipe digits --weight-decay 0.1 --clip 1.0 --accumulate 2 --model.width 8 --threads 1",
    "train --steps 1 --offload disk --offload-folder scratch --model.width 8 --threads 1",
    "train --resume RUN",
    "compare --rule sll:weight=0.5 backprop --seeds 1 --steps 1 --no-report --model.width 8",
    "eval RUN --split val",
    "eval RUN --batch-size 64 --json figures.json",
    "beliefs RUN",
    "predict RUN image.png",
    "export RUN weights.safetensors",
    "validate --rule sll --model mlp",
    "validate RUN",
    "report RUN",
    "ls rules",
    "describe sll",
    "bench memory --rule local_ce --depths 4 --model.width 8 --batch-size 4",
]
POISON = [
    *(
        "",
        " ",
        "-1",
        "0",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "1e-999",
        "10" * 200,
        "0x10",
        "1_000",
        "½",
        "１２",
        "none",
        "None",
    ),
    *(
        "true",
        "[]",
        "{}",
        "../../x",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        ".",
        "..",
        "/",
        "a" * 300,
        "\x00",
        "\n",
    ),
    *(
        "--",
        "-",
        "--help",
        "-h",
        "--=",
        "=",
        ":",
        "::",
        "a:b=c",
        "é",
        "\U0001f600",
        "'; rm -rf x",
        "%s%n",
        "$HOME",
        "~",
        "*",
    ),
]


def around(folder: Path) -> set[str]:
    """Everything beside a folder."""
    return {path for path in listing(folder.parent) if path.split("/")[0] != folder.name}


def mutated(draw: random.Random, words: list[str]) -> list[str]:
    """A command line with one to three faults."""
    words = list(words)
    for _ in range(draw.randint(1, 3)):
        i = draw.randrange(1, len(words) + 1)
        kind = draw.randrange(7)
        if kind == 0 and i < len(words):
            words[i] = draw.choice(POISON)
        elif kind == 1 and i < len(words):
            del words[i]
        elif kind == 2:
            words.insert(i, draw.choice(POISON))
        elif kind == 3 and i < len(words):
            words.insert(i, words[i])
        elif kind == 4 and i < len(words) and words[i]:
            at = draw.randrange(len(words[i]))
            words[i] = words[i][:at] + draw.choice("abz-_.=:/0 9é") + words[i][at + draw.randint(0, 1) :]
        elif kind == 5 and len(words) > 2:
            j = draw.randrange(1, len(words))
            i = min(i, len(words) - 1)
            words[i], words[j] = words[j], words[i]
        elif i < len(words) and words[i].startswith("--"):
            words[i] = f"{words[i]}={draw.choice(POISON)}"
    return [word.replace("\x00", "\\0") if "\x00" in word else word for word in words]


def mutated_json(draw: random.Random, text: str) -> str:
    """A record with a fault: of JSON, of a type, of a value, of a name."""
    kind = draw.randrange(6)
    if kind == 0:
        at = draw.randrange(len(text))
        return text[:at]
    if kind == 1:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice('{}[]",:0xn\\') + text[at + 1 :]
    found = json.loads(text)
    place, key = found, draw.choice(list(found))
    while isinstance(place[key], dict) and place[key] and draw.random() < 0.6:
        place, key = place[key], draw.choice(list(place[key]))
    value = draw.choice(
        [None, -1, 0, 1.5, 1e308, float("nan"), float("inf"), "x", "", [], {}, [[]], True, "\u0000", 10**40]
    )
    if kind == 2:
        del place[key]
    elif kind == 3:
        place[f"{key}x"] = place.pop(key)
    else:
        place[key] = value
    return json.dumps(found)


def mutated_recipe(draw: random.Random, text: str) -> str:
    """A recipe with a fault."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 2)):
        i = draw.randrange(len(lines))
        line = lines[i]
        lines[i] = draw.choice(
            [
                "",
                line[: draw.randrange(len(line) + 1)],
                line.partition("=")[0]
                + "= "
                + draw.choice(["nan", "-1", '"x"', "[]", "{}", "1e999", "true", "9" * 400]),
                line + line,
                "[rule]",
                "=",
            ]
        )
    return "\n".join(lines)


def run(count: int, seed: int, folder: Path, deadline: float) -> Tally:
    """`count` attempts: three of five with options, one with a record, one with a recipe."""
    import torch
    from PIL import Image

    from layerwise.runs import options

    tally, draw = Tally("words", PROMISE), random.Random(seed)
    torch.set_num_threads(1)
    home = folder / "home"
    with inside(home):
        Image.new("L", (8, 8), 7).save("image.png")
        words = "train --steps 2 --model.width 8 --threads 1 --out RUN --rule sid"
        assert command(words.split(), folder / "job", 60).code == 0
        clean = folder / "clean"
        shutil.copytree(home, clean)
        recipe = (Path(options.__file__).parent / "recipes" / "digits.toml").read_text()
        for number in range(count):
            if time.monotonic() > deadline:
                break
            before = around(folder)
            part = number % 5
            if part < 3:
                words = mutated(draw, draw.choice(SEEDS).split())
                what = " ".join(words)
            elif part == 3:
                file = draw.choice(["config.json", "result.json"])
                record = home / "RUN" / file
                record.write_text(mutated_json(draw, record.read_text()))
                words = draw.choice(
                    ["eval RUN", "train --resume RUN", "validate RUN", "export RUN w.safetensors"]
                ).split()
                what = f"{' '.join(words)} with {file} {record.read_text()[:4000]}"
            else:
                (home / "mine.toml").write_text(mutated_recipe(draw, recipe))
                words = ["train", "--recipe", "mine.toml", "--steps", "1", "--threads", "1"]
                what = f"recipe {(home / 'mine.toml').read_text()!r}"
            attempt = command(words, folder / "job", 60)
            faults = attempt.faults()
            if attempt.code == 1 and words[0] == "compare":  # a run of the comparison has failed, and says why
                faults = [fault for fault in faults if fault != "exit code 1"]
            if around(folder) != before:
                faults.append("a file outside of the folder")
            tally.add(f"words {number}, seed {seed}: {what[:600]!r}", [f"{f} {attempt.err[-400:]!r}" for f in faults])
            for path in home.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            shutil.copytree(clean, home, dirs_exist_ok=True)
    return tally
