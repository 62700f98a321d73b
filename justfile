# The one list of commands. `just` alone shows it. `.ci/run` runs the same recipes.

_list:
    @just --list

# Lint, format, types, layers
check: lint format types layers

lint:
    ruff check .

format:
    ruff format --check .

types:
    basedpyright

# An import that points up fails
layers:
    lint-imports

# Examples in docstrings
doctests:
    python -m pytest -q --doctest-modules --doctest-ignore-import-errors src -p no:cacheprovider

# The fast suite, or some of it: just test tests/core -k engine
test *words:
    python -m pytest --durations=10 -p no:cacheprovider {{words}}

# What needs transformers, Lightning or timm: pip install -c constraints.txt -e '.[test,hf,lightning]' first
frameworks:
    python -m pytest -m "slow or not slow" tests/frameworks tests/project/test_examples.py tests/cli/test_outside.py tests/core/test_calls_use.py tests/project/test_readme.py -p no:cacheprovider

# What the fast suite leaves out: every rule on every family of models, what starts many processes, whole grids
slow *words:
    python -m pytest -m slow --durations=10 -p no:cacheprovider {{words}}

# Break the library on purpose; the tests must notice. Words select mutants by name
mutants *words:
    python tools/mutate.py {{words}}

# Build the site
docs folder="site":
    NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir {{folder}}

# The notebooks are those of their guides, and run
notebooks:
    python tools/notebooks.py --check

# A benchmark: just bench memory --depths 4,16
bench name *words:
    layerwise bench {{name}} {{words}}

# Seeded attempts to break what docs/reliability.md promises; a sample of at most five minutes
campaigns *words="--sample":
    python tests/campaigns/run.py {{words}}

# The folders of evidence, each with a README on how to reproduce it
evidence:
    @ls -d benchmarks/*/

# Wheel and sdist
build:
    python -m pip wheel --no-deps --wheel-dir dist .
