"""Numbers on the command line are read as people write them; words stay words."""

import math
from dataclasses import dataclass, field

import pytest

from layerwise import LayerwiseError
from layerwise.cli.words import BeliefsOptions, EvalOptions, PromptOptions
from layerwise.measure.bench_options import MemoryOptions
from layerwise.parsing import environment_number, parse, read_number, read_whole
from layerwise.rules.words import value_of
from layerwise.runs.launch import ParallelOptions
from layerwise.scaling.options import ScalingOptions


@dataclass
class Options:
    """Options of every kind that the commands have."""

    whole: int = 1
    number: float = 1.0
    maybe: int | None = None
    several: float | tuple[float, ...] = 1.0
    shape: tuple[int, int] = (1, 1)
    pairs: dict[str, float] = field(default_factory=dict)
    out: str = "x"


ODD = ("1_0", "\uff11\uff10", "\u0661", "1__0", "0x1", "1 0", "")


@pytest.mark.parametrize("word", ODD)
@pytest.mark.parametrize("option", ["whole", "number", "maybe", "several", "shape 1", "several 1", "pairs block1"])
def test_a_number_is_written_in_plain_digits(option, word):
    """Python reads these as 10 or 1, or refuses them; a person who reads the command does not."""
    with pytest.raises(LayerwiseError) as refused:
        parse(Options, [*f"--{option}".split(), word], "train")
    assert str(refused.value).startswith(f"--{option.split()[0]} ") and "Error parsing" not in str(refused.value)


def test_numbers_and_words_are_read_as_ever():
    words = "--whole -3 --number 1e-3 --maybe 7 --several .5 2. --shape 3 +4 --pairs a 1E2 b -inf --out 1_0"
    found = parse(Options, words.split(), "train")
    assert found == Options(-3, 0.001, 7, (0.5, 2.0), (3, 4), {"a": 100.0, "b": -math.inf}, "1_0")
    assert math.isnan(parse(Options, ["--number", "nan"], "train").number)


@pytest.mark.parametrize("word", ODD)
def test_lists_and_the_environment_have_the_same_numbers(word, monkeypatch):
    for read in (read_whole, read_number):
        with pytest.raises(ValueError, match=r"invalid literal|could not convert"):
            read(word)
    with pytest.raises(LayerwiseError, match="stages is"):
        ParallelOptions(parallel="pipeline", stages=f"1,{word}")
    with pytest.raises(LayerwiseError, match="--ranks"):
        ScalingOptions(ranks=f"1,{word}").counts()
    assert value_of(word, float) == word  # and is refused by the rule's own check
    monkeypatch.setenv("WORLD_SIZE", word)
    with pytest.raises(LayerwiseError, match="WORLD_SIZE is"):
        environment_number("WORLD_SIZE")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (EvalOptions, ["--batch-size"]),
        (BeliefsOptions, ["--batch-size"]),
        (PromptOptions, ["--top-k"]),
        (MemoryOptions, ["--shape", "1", "8"]),
        (ScalingOptions, ["--steps"]),
    ],
)
def test_whole_numbers_of_more_than_64_bits_are_refused_by_every_command(options, words):
    with pytest.raises(LayerwiseError, match=r"it must be 2\^63 - 1 at most"):
        parse(options, [*words, f"{10**30}"], "command")


@pytest.mark.parametrize("parallel", ["none", "data", "sharded"])
def test_stages_without_a_pipeline_are_refused(parallel):
    with pytest.raises(LayerwiseError, match=f"stages is 2,2 with --parallel {parallel}"):
        ParallelOptions(parallel=parallel, stages="2,2")


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("--a\nb", "unknown options: --a\N{REPLACEMENT CHARACTER}b;"),
        ("a\x1b[31m\nb", "unknown options: a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b;"),
        ("--split=te\nst", "--split is 'te\N{REPLACEMENT CHARACTER}st'; choose one of"),
        ("--batch-size=1\n", "--batch-size is '1\N{REPLACEMENT CHARACTER}', which is not a whole number;"),
    ],
)
def test_a_line_break_in_a_word_leaves_its_sentence_whole(word, part):
    with pytest.raises(LayerwiseError) as caught:
        parse(EvalOptions, [word], "eval")
    assert str(caught.value).startswith(part) and str(caught.value).endswith("see layerwise eval --help.")
