"""`layerwise completion SHELL`: shell completion. It needs no torch."""

from collections.abc import Iterable, Sequence

from layerwise.cli import catalogue
from layerwise.cli.commands import ANYWHERE, BENCHES, COMMANDS, LISTS
from layerwise.cli.help import groups_of, written
from layerwise.cli.options import Option, options_of
from layerwise.errors import LayerwiseError, suggestion

# Bash splits words at : and =, so the script reads the words from the line, and removes the front of the completions.
SCRIPTS = {
    "bash": """\
_layerwise() {
    local line="${COMP_LINE:0:COMP_POINT}" word front
    local -a words
    read -r -a words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    front="${word%"${word##*[:=]}"}"
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("${word#"$front"}")
    done < <("${words[0]}" completion --words "${words[@]:1}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=:.] ]]; then compopt -o nospace; fi
}
complete -o bashdefault -o default -F _layerwise layerwise
""",
    "zsh": """\
#compdef layerwise
_layerwise() {
    local -a found
    found=("${(@f)$(${words[1]} completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z "${found[*]}" ]]; then _files; return; fi
    local -a begun=("${(@M)found:#*[=:.]}") whole=("${(@)found:#*[=:.]}")
    compadd -S '' -a begun
    compadd -a whole
}
compdef _layerwise layerwise
""",
    "fish": """\
function __layerwise_complete
    set -l found (layerwise completion --words (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c layerwise -f -a '(__layerwise_complete)'
""",
}
"""What `layerwise completion SHELL` prints."""
VALUES = {"--device": ("auto", "cpu", "cuda", "mps", "xpu"), "--augment": ("flip", "crop", "cutout")}
"""Values of a few options that their types do not list."""


def completion_command(argv: list[str]) -> int:
    """`layerwise completion bash|zsh|fish`: print the script; with `--words`, completions of the last word."""
    if argv[:1] == ["--words"]:
        for word in candidates(argv[1:] or [""]):
            print(word)
        return 0
    if len(argv) != 1 or argv[0] not in SCRIPTS:
        near = f"{argv[0]!r} is not one; {suggestion(argv[0], list(SCRIPTS))}" if argv else ", ".join(SCRIPTS)
        raise LayerwiseError(f"name one shell: {near}.")
    print(SCRIPTS[argv[0]], end="")
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """Complete the last word of a line; nothing if it is a file or unknown.

    >>> candidates(["tra"]), candidates(["ls", "m"]), candidates(["train", "--rule", "sl"])
    (['train'], ['models'], ['sll'])
    >>> candidates(["train", "--rule", "sll", "--rule.over"]), candidates(["compare", "--rule", "sll", "sll:over"])
    (['--rule.overlap'], ['sll:overlap='])
    """
    *before, word = words
    if not before:
        return _starting(word, [*COMMANDS, "--help", "--version"])
    name, *given = before
    if given and f"{name} {given[0]}" in BENCHES:
        name, given = f"{name} {given[0]}", given[1:]
    if (command := {**COMMANDS, **BENCHES}.get(name)) is None:
        return []
    named = given[:-1] if given and given[-1].startswith("--") else given  # its value is still missing
    try:
        options = [option for _, group in groups_of(name, command, named) for option in group]
    except LayerwiseError:  # a recipe that cannot be read
        options = []
    known = {option.flag: option for option in options}
    flag, given_with, _ = word.partition("=")
    if given_with and flag in known:
        return [f"{flag}={value}" for value in _values(name, known[flag], word.partition("=")[2])]
    last = next((place for place in range(len(given) - 1, -1, -1) if given[place].startswith("--")), None)
    option = None if last is None else known.get(given[last])
    waits = option is not None and option.value and (option.several or last == len(given) - 1)
    if option is not None and waits and not word.startswith("-"):
        return _values(name, option, word)
    if word.startswith("-"):
        flags = [flag for option in options for flag in _flags(option)]
        return _starting(word, [*flags, *ANYWHERE])
    if given:
        return []
    return _starting(word, catalogue.rules() if name == "describe" else command.choices)


def _values(command: str, option: Option, word: str) -> list[str]:
    """Completions of the value of an option."""
    part = option.flag.removeprefix("--")
    if part not in LISTS:
        return _starting(word, option.choices or VALUES.get(option.flag, ()))
    front, comma, last = word.rpartition(",") if part == "rule" and option.several else ("", "", word)
    head, colon, inner = last.partition(":")
    if part == "rule" and option.several and colon and (place := catalogue.class_of_rule(head)) is not None:
        done, _, inner = last.rpartition(":")
        names = [f"{found.flag.removeprefix('--').replace('-', '_')}=" for found in options_of(*place)]
        return [f"{front}{comma}{done}:{name}" for name in _starting(inner, names)]
    names = getattr(catalogue, LISTS[part])()
    fixed = [name.partition("PATH")[0].partition("owner")[0].partition("FILE")[0] for name in names]
    return [f"{front}{comma}{name}" for name in _starting(last, dict.fromkeys(filter(None, fixed)))]


def _flags(option: Option) -> list[str]:
    """Spellings of the flag of an option: a switch has two."""
    return [option.flag, written(option).replace("[no-]", "no-")] if not option.value else [option.flag]


def _starting(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(word)]
