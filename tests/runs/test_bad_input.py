"""Wrong uses: each gives one clear sentence and exit code 2, and leaves no files."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from support.runs import split, train

from layerwise.cli.main import main

PIL = pytest.importorskip("PIL.Image", reason="the data extra is not installed")
pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")


def images(folder, counts):
    """An image folder of grey 8x8 noise: class name to number of images."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(100 * label + i).integers(0, 256, (8, 8), dtype=np.uint8)
            PIL.fromarray(pixels).save(folder / name / f"{i}.png")


def table(rows, label=lambda i: i % 2):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": b"no picture", "path": None}] * rows, kind)
    return pa.table({"image": cells, "label": pa.array([label(i) for i in range(rows)], pa.int64())})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Broken and whole data, and runs, that the lines of the table name; `run` is whole and on digits."""
    base = tmp_path_factory.mktemp("prepared")
    run = train(base / "run", "--steps", "2", "--save-every", "1")
    for name in ("no_config", "config_text", "config_list", "config_field", "other_model", "other_lr", "torn", "fresh"):
        shutil.copytree(run, base / name)
    (base / "no_config" / "config.json").unlink()
    (base / "config_text" / "config.json").write_text('{"rule": ')
    (base / "config_list" / "config.json").write_text("[1, 2]")
    config = json.loads((run / "config.json").read_text())
    (base / "config_field" / "config.json").write_text(json.dumps(config | {"learning_rate": 1}))
    (base / "other_model" / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"width": 17}}))
    (base / "other_lr" / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    for file in base.glob("torn/checkpoints/*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    shutil.rmtree(base / "fresh" / "checkpoints")
    (base / "fresh" / "result.json").unlink()

    (base / "empty").mkdir()
    (base / "full").mkdir()
    (base / "full" / "notes.txt").write_text("mine")
    (base / "text.parquet").write_text("these are words\n" * 100)
    pq.write_table(table(0), base / "rowless.parquet")
    pq.write_table(table(20), base / "whole.parquet")
    (base / "truncated.parquet").write_bytes((base / "whole.parquet").read_bytes()[:-40])
    pq.write_table(table(20, lambda i: -1), base / "negative.parquet")
    pq.write_table(pa.table({"a": [1.0], "b": [2.0]}), base / "columns.parquet")
    images(base / "two", {"cat": 10, "dog": 10})
    images(base / "one", {"cat": 10})
    images(base / "unreadable", {"cat": 10, "dog": 10})
    (base / "unreadable" / "dog" / "3.png").write_bytes(b"no picture")
    images(base / "labels" / "train", {"cat": 10, "dog": 10})
    images(base / "labels" / "test", {"cat": 2, "dog": 2, "eel": 2})
    images(base / "grown", {"cat": 10, "dog": 10})
    train(base / "grown_run", "--data", f"imagefolder:{base / 'grown'}", "--steps", "1", "--batch-size", "4")
    images(base / "grown_by", {"eel": 10})
    shutil.move(base / "grown_by" / "eel", base / "grown" / "eel")
    pixels = np.zeros((2, 1, 8, 8), dtype=np.float32)
    np.save(base / "whole.npy", pixels)
    np.save(base / "colour.npy", pixels.repeat(3, axis=1))
    np.save(base / "words.npy", np.array([[[["a"] * 8] * 8]]))
    pixels[1, 0, 2, 3] = np.nan
    np.save(base / "nan.npy", pixels)
    np.save(base / "none.npy", pixels[:0])
    (base / "torn.npy").write_bytes((base / "whole.npy").read_bytes()[:200])
    (base / "wrong.toml").write_text("epochs = [[[")
    (base / "field.toml").write_text("epoch = 3")
    return base


TABLE = """
frobnicate                                   | unknown command 'frobnicate'; train
trian                                        | unknown command 'trian'; did you mean 'train'?
train --rule slll                            | unknown rule 'slll'; did you mean 'sll'?
train --model mpl                            | unknown model 'mpl'; did you mean 'mlp'?
train --data digit                           | unknown data set 'digit'; did you mean 'digits'?
train --recipe digit                         | unknown recipe 'digit'; did you mean 'digits'?
train --recipe B/wrong.toml                  | wrong.toml cannot be read
train --recipe B/field.toml                  | unknown field 'epoch'; did you mean 'epochs'?
train --recipe B/absent.toml                 | no recipe file
train --optimizer adamm                      | unknown optimizer 'adamm'; did you mean 'adam
train --optimizer-options momentun 1         | no option 'momentun'
train --optimizer-options momentum           | --optimizer-options takes pairs
train --optimizer-options betas 3            | AdamW refuses its options
train --augment flop                         | unknown augmentation 'flop'; did you mean 'flip'?
train --device tpu                           | device 'tpu'; cpu
train --device meta                          | device 'meta'; cpu
train --device cuda:99                       | no device 'cuda:99' here
train --precision fp33                       | 'fp33'; --precision; fp32
train --schedule linear                      | 'linear'; --schedule; cosine
train --epochs                               | --epochs needs a value
train --rule                                 | --rule needs a value
train --epchs 3                              | --epchs; did you mean --epochs
train --rule.surrogat kl                     | --rule.surrogat; did you mean --rule.surrogate
train --rule.surrogate cosine                | 'cosine'; --rule.surrogate; hellinger
train --rule backprop --rule.surrogate kl    | --rule.surrogate
train --epochs many                          | --epochs is 'many'; whole number
train --epochs 1.5                           | --epochs is '1.5'; whole number
train --lr fast                              | --lr is 'fast'; not a number
train digits                                 | unknown options: digits
train --epochs 0                             | epochs is 0; 1 or more
train --steps -1                             | steps is -1; 1 or more
train --batch-size 0                         | batch_size is 0; 1 or more
train --batch-size 5000                      | batch size 5000 is larger than the 1294 training samples
train --accumulate 0                         | accumulate is 0; 1 or more
train --save-every 0                         | save_every is 0; 1 or more
train --lr 0                                 | lr is 0; larger than 0
train --lr -1                                | lr is -1; larger than 0
train --lr nan                               | lr is nan; finite
train --lr inf                               | lr is inf; finite
train --rule.weight nan                      | weight is nan; finite
train --weight-decay -1                      | weight_decay is -1; 0 or larger
train --weight-decay inf                     | weight_decay is inf; finite
train --seed -1                              | seed is -1; 0 or more
train --clip nan                             | clip is nan; finite
train --warmup nan                           | warmup is nan; finite
train --label-smoothing nan                  | label_smoothing is nan; finite
train --log-every 0                          | log_every is 0; 1 or more
train --rule.weight -1                       | weight is -1.0; 0 or larger
train --rule.weight 1 nan                    | weight is nan; finite
train --rule ssl_local --rule.temperature 0  | temperature is 0.0; larger than 0
train --clip 0                               | clip is 0; larger than 0
train --warmup 2                             | warmup is 2; [0, 1)
train --val-fraction 1.5                     | val_fraction is 1.5; [0, 1)
train --val-fraction 0.0001                  | fraction 0.0001; no sample; raise it or use 0
train --label-smoothing 1                    | label_smoothing is 1; [0, 1)
train --image-size 0                         | image; size; 0
train --cuts block9                          | unknown cut 'block9'; block1
train --blocks 9                             | 9; blocks
train --lr-multipliers block9 2              | no block 'block9'; did you mean 'block
train --lr-multipliers block1 -1             | lr_multipliers; block1; -1; 0 or larger
train --rule.group 0                         | group is 0
train --rule.dim 3                           | dim is 3, smaller than the 10 classes
train --rule.dropout 1.5                     | dropout is 1.5; [0, 1)
train --rule.scale 0                         | scale is 0; larger than 0
train --rule sid_cascade                     | trains the model 'sid_cascade'; use rule 'sid'
train --rule graph_forward                   | does not train the model 'mlp'; gcn or gat
train --rule graph_forward --model vit       | does not train the model 'vit'; gcn or gat
train --rule equilibrium_propagation --model vit | does not train the model 'vit'; mlp
train --rule noprop_dt                       | trains the model 'noprop'
train --rule boosted --rule.updates 0        | updates is 0; 1 or more
train --rule ssl_local --rule.augment flop   | unknown augmentation 'flop'; did you mean 'flip'?
train --data B/absent.csv                    | no file B/absent.csv
train --rule sid --rule.direction reverse    | direction="reverse"; label_smoothing
train --rule sid --rule.direction back       | 'back'; --rule.direction; reverse
train --rule sid --rule.alpha 0              | alpha is 0.0; (0, 1]
train --rule sid --rule.alpha 0.5 2          | alpha is 2.0; (0, 1]
train --rule sid --rule.hidden -1            | hidden is -1
train --label-noise 1                        | label_noise is 1.0; [0, 1)
train --label-noise nan                      | label_noise is nan; finite
train --label-noise-kind random              | 'random'; --label-noise-kind; pairs
train --label-noise 0.2 --label-noise-kind pairs | cifar10; symmetric
train --model sid_cascade --model.depth -1   | depth must be a whole number of at least 0, not -1
train --model.depth 0                        | depth must be a whole number of at least 1, not 0
train --model.dropout 1.5                    | dropout must be at least 0 and less than 1, not 1.5
train --model vit --model.patch 3            | patch; 3; 8
train --model vit --model.heads 5            | heads; 5
train --data imagefolder:B/absent            | B/absent is not a folder
train --data imagefolder:B/empty             | no images under B/empty
train --data imagefolder:B/one               | only the class 'cat'
train --data imagefolder:B/unreadable        | dog/3.png is not a readable image
train --data imagefolder:B/labels            | cat, dog; eel
train --data parquet:B/absent                | B/absent does not exist
train --data parquet:B/rowless.parquet       | rowless.parquet holds no rows
train --data parquet:B/truncated.parquet     | truncated.parquet is not a readable parquet file
train --data parquet:B/text.parquet          | text.parquet is not a readable parquet file
train --data parquet:B/negative.parquet      | negative label -1
train --data parquet:B/columns.parquet       | no image column; a, b
train --data parquet:B/whole.parquet         | row 0 of B/whole.parquet is not a readable image
train --data hf:                             | unknown data set 'hf:'
train --out B/text.parquet/run --steps 1     | cannot write to B/text.parquet/run; --out
train --out B/full --steps 1                 | B/full is not empty and is not a run; --out
train --out B/full --steps 1 --overwrite     | B/full is not the folder of a run
train --resume                               | --resume needs a value
train --resume B/absent                      | B/absent holds no run
train --resume B/no_config                   | no_config holds no run
train --resume B/run --epochs 3              | --resume; '--epochs 3' cannot be given
train --resume B/config_text                 | config.json is damaged
train --resume B/config_list                 | config.json; [1, 2]
train --resume B/config_field                | unknown field 'learning_rate'
train --resume B/other_model                 | another run; config.json; model; 17; 16
train --resume B/other_lr                    | another run; lr = 0.5; 0.001
train --resume B/torn                        | every checkpoint; is damaged
train --resume B/grown_run                   | grown has changed since the run began; eel
eval                                         | eval needs RUN
beliefs                                      | beliefs needs RUN
beliefs B/absent                             | B/absent holds no run
beliefs B/run                                | rule 'sll'; refines no belief
beliefs B/run --split all                    | 'all'; --split; val
eval B/absent                                | B/absent holds no run
eval B/full                                  | B/full holds no run
eval B/fresh                                 | no checkpoint yet; train it first
eval B/torn                                  | every checkpoint; is damaged
eval B/other_model                           | another run; model
eval B/grown_run                             | grown has changed since the run began; eel
eval B/run --split dev                       | 'dev'; --split; val
eval B/run --batch-size 0                      | batch size is 0; 1 or more
eval B/run --device cuda:99                  | no device 'cuda:99' here
predict                                      | predict needs RUN
predict B/run                                | predict needs INPUT
predict B/run B/absent.png                   | no file or folder B/absent.png
predict B/run B/empty                        | B/empty holds no images
predict B/run B/text.parquet                 | text.parquet is not a readable image
predict B/run B/nan.npy                      | nan.npy holds NaN
predict B/run B/colour.npy                   | shape (2, 3, 8, 8); (N, 1, 8, 8)
predict B/run B/torn.npy                     | torn.npy is not a readable .npy
predict B/run B/words.npy                    | words.npy; numbers
predict B/run B/none.npy                     | none.npy holds no images
predict B/run B/whole.npy --out B/full/a/b   | could not write B/full/a/b
ls                                           | rules|models|data|recipes
ls rule                                      | rules|models|data|recipes
describe                                     | name one rule
describe sl                                  | unknown rule 'sl'; did you mean 'sll'?
bench                                        | memory, speed, scaling
bench time                                   | 'time'; memory, speed, scaling
bench memory --depths x                      | --depths 'x'
bench memory --depths 0                      | depth; 0
bench memory --depths 4,,8                   | --depths '4,,8'
bench memory --rule slll                     | unknown rule 'slll'; did you mean 'sll'?
bench memory --model mpl                     | unknown model 'mpl'; did you mean 'mlp'?
bench memory --model.wdth 3          | 'wdth'; did you mean 'width'?
bench memory --batch-size 0                  | batch size
bench memory --offload disk                   | 'backprop' cannot be offloaded
bench memory --offload disk --rule sll --offload-folder no/such | cannot offload blocks to no/such
bench memory --json=B/full/a/b               | could not write; B/full/a/b
bench speed --rounds 0                       | rounds is 0
bench speed --rule backprop slll            | unknown rule 'slll'; did you mean 'sll'?
bench speed --model mpl                      | unknown model 'mpl'; did you mean 'mlp'?
bench speed --model.width 2.5        | width; 2.5
bench speed --optimizer adamm --model mlp    | unknown optimizer 'adamm'
bench speed --threads 0                      | threads is 0
bench scaling --ranks 1,x                    | --ranks '1,x'
bench scaling --ranks 0                      | --ranks '0'
bench scaling --ways rule gpip               | unknown way 'gpip'; did you mean 'gpipe'?
bench scaling --ways pipeline                | the ways must include rule
bench scaling --ranks 8                      | micro-batches is 4; at least as many as ranks (8)
bench scaling --depth 3                      | zbv on 4 ranks needs 8 parts
bench scaling --ways rule data --batch-size 6 | 4 replicas cannot share a batch of 6; --batch-size 4 or 8
bench scaling --rounds 0                     | rounds is 0
bench scaling --simulate 1                   | simulate is 1
bench scaling --bandwidth 0                  | bandwidth is 0.0 Gbit/s
validate --rule slll                         | unknown rule 'slll'; did you mean 'sll'?
validate --model mpl                         | 'mpl'; --model; mlp
validate B/absent                            | B/absent holds no run
"""
ROWS = [tuple(part.strip() for part in row.split(" | ")) for row in TABLE.strip().splitlines()]


def touched(folder):
    """When each of its files was last written, and its size."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize(("words", "fragments"), ROWS, ids=[row[0] for row in ROWS])
def test_one_clear_sentence(prepared, tmp_path, monkeypatch, capsys, words, fragments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(prepared.parent / "cache"))
    before = touched(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = main(split(re.sub(r"\bB/", f"{prepared}/", words)))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"layerwise: [^\n]{10,700}\n", err), err
    for fragment in fragments.split("; "):
        assert fragment.replace("B/", f"{prepared}/") in err
    assert list(tmp_path.iterdir()) == []
    assert touched(prepared) == before


def test_there_are_enough_wrong_uses():
    assert len(ROWS) == len(set(ROWS)) >= 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys, tmp_path):
    assert main(["train", "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "there is no device 'cuda' here (no accelerator); choose cpu or auto" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["sll", "backprop"])
def test_a_diverging_run_names_block_step_and_advice(tmp_path, capsys, rule):
    words = "--lr 1e30 --optimizer sgd --schedule constant --model.width 16 --steps 40 --epochs 2"
    assert main(["train", *split(words), "--rule", rule, "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert re.search(r"block\d|head", last)
    assert re.search(r"step \d+", last)
    assert "learning rate" in last or "--lr" in last
    assert "Traceback" not in err


def test_without_the_network_the_hub_is_given_up_soon(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets", reason="the data extra is not installed")
    import time

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    started = time.perf_counter()
    assert main(["train", "--data", "hf:no-one/nothing-at-all"]) == 2
    assert time.perf_counter() - started < 10
    sentence = capsys.readouterr().err
    assert "cannot get no-one/nothing-at-all" in sentence
    assert "no route; check the name and the network" in sentence.replace("))", "").replace(")", "")


def unreachable(*_, **__):
    raise OSError("no route")
