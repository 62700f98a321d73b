"""How ranks meet: every wait ends, all agree before anything is sent, and no received data runs as code."""

import ast
import datetime
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from shlex import split

import pytest
import torch
import torch.distributed as dist
from support.jobs import DATA, LONG, PIPELINE, TINY, check_hangs, job, own_store, run, under_way
from support.runs import contents, open_files
from torch import nn

import layerwise
from layerwise import LayerwiseError, Learner
from layerwise.cli.main import main
from layerwise.data.rows import FileRows
from layerwise.data.sources import ImageFormat, StreamedSource
from layerwise.parallel.ranks import Ranks, difference
from layerwise.parallel.rendezvous import Job, NoAnswer, StoreClient, listen, open_store, within
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.serialization import TensorSpec, decode, encode
from layerwise.runs import checkpoint
from layerwise.runs.agreement import digest_of_samples, facts_of_checkpoint
from layerwise.runs.distributed_checkpoint import LocalTensor, shared_out
from layerwise.runs.options import TrainOptions, to_mapping

SHARDED = split("train --parallel sharded --timeout 30")
SOURCE = Path(layerwise.__file__).parent


# Every wait has an end.


def test_within_gives_the_result_or_the_error_or_up():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    begun = time.monotonic()
    with pytest.raises(NoAnswer, match=r"timed out after 0\.1 s"):
        within(0.1, lambda: time.sleep(1))
    assert time.monotonic() - begun < 0.9


@pytest.mark.slow
def test_no_call_on_a_stopped_store_lasts_longer_than_its_limit():
    """The store lives in a process that is stopped, as rank 0 may be."""
    context = get_context("fork")
    ours, theirs = context.Pipe()

    def keep():
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        theirs.send(store.port)
        time.sleep(60)

    keeper = context.Process(target=keep)
    keeper.start()
    try:
        port = ours.recv()
        calls = {
            "has": lambda client: client.has("key"),
            "get": lambda client: client.get(["key"]),
            "set_once": lambda client: client.set_once("key", "other"),
            "wait": lambda client: client.wait(["nothing"], 60),
            "clone": lambda client: client.clone(),
        }
        clients = {name: StoreClient(dist.TCPStore("127.0.0.1", port, is_master=False), 0.3) for name in calls}
        for client in clients.values():
            client.set("key", "text")
            assert client.get(["key"]) == ["text"]
        os.kill(keeper.pid, signal.SIGSTOP)
        os.waitpid(keeper.pid, os.WUNTRACED)  # until all its threads have stopped
        for name, call in calls.items():
            begun = time.monotonic()
            with pytest.raises(NoAnswer):
                call(clients[name])
            assert time.monotonic() - begun < 2, name
            begun = time.monotonic()
            with pytest.raises(NoAnswer):  # what has failed once is not waited for again
                clients[name].has("key")
            assert time.monotonic() - begun < 0.2, name
    finally:
        keeper.kill()  # the threads of the calls end with it
        keeper.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DATA, PIPELINE], ids=["data", "pipeline"])
def test_rank_0_is_named_where_it_keeps_the_store_and_is_stopped(kind, tmp_path):
    words = [*kind, *LONG, *(["--stages", "2,2"] if kind is PIPELINE else [])]
    name = "rank 0 (block1..block2)" if kind is PIPELINE else "rank 0"
    told = check_hangs(2, 0, name, tmp_path / "out", tmp_path / "job", words, own_store(2), 4)
    assert all("has not answered" in text and "Traceback" not in text for text in told), told


@pytest.mark.slow
def test_a_silent_program_at_the_port_is_told_within_the_limit(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        variables = {rank: {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"} for rank in range(2)}
        begun = time.monotonic()
        codes, errors = run(2, tmp_path / "job", [*DATA, *TINY, "--timeout", "1"], variables=variables)
        assert time.monotonic() - begun < 8
    assert codes == [2, 2]
    for error in errors:
        assert f"a program listens at port {port} of 127.0.0.1, but it has not answered" in error.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["torchrun", "rank 0"])
def test_other_numbers_of_ranks_are_told_at_once_by_all(own, tmp_path):
    variables = own_store(2) if own else {0: {}, 1: {}}
    variables = {0: variables[0], 1: variables[1] | {"WORLD_SIZE": "3"}}
    begun = time.monotonic()
    codes, errors = run(2, tmp_path / "job", [*DATA, *TINY], variables=variables)  # whose limit is 30 seconds
    assert time.monotonic() - begun < 15
    assert codes == [2, 2]
    for error in errors:
        (line,) = [line for line in error.splitlines() if line.startswith("layerwise: ")]
        assert "the ranks differ in the number of ranks (2 on rank 0, 3 on rank 1)" in line


@pytest.mark.slow
def test_two_processes_with_one_number_are_told(tmp_path):
    codes, errors = run(2, tmp_path / "job", [*DATA, *TINY, "--timeout", "2"], variables={1: {"RANK": "0"}})
    assert codes == [2, 2] and any("two processes are rank 0" in error for error in errors), errors


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("RANK", "2", "RANK is 2 and WORLD_SIZE is 2"),
        ("RANK", "first", "RANK is 'first'"),
        ("WORLD_SIZE", "9" * 30, "the most is 65536"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000"),
        ("MASTER_PORT", "0", "MASTER_PORT is 0"),
        ("MASTER_ADDR", "192.0.2.1", "rank 0 cannot listen at port"),  # an address that no machine has
    ],
)
def test_a_variable_without_a_sense_is_told(name, value, sentence, monkeypatch, capsys):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1024"} | {name: value}
    for variable, text in given.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert main([*DATA, *TINY, "--timeout", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("layerwise: ") and told.count("\n") == 1 and sentence in told


def test_an_address_that_nobody_has_is_not_said_to_be_in_use():
    job = Job(rank=1, count=2, address="no-such-host.invalid", port=1024, agent=True, attempt=0)
    with pytest.raises(LayerwiseError, match=r"did not find one another within 0\.2 s .*no-such-host") as told:
        open_store(job, 0.2)
    assert "a program listens" not in str(told.value)


# All agree before anything is sent.


def test_a_difference_names_what_and_who():
    same = {"lr": 0.1, "rule": "sll"}
    assert difference({0: same, 1: dict(same), 5: dict(same)}) is None
    found = difference({0: same, 1: {**same, "lr": 0.5}, 2: {**same, "lr": 0.5}, 3: {"rule": "sid", "lr": 0.1}})
    assert "lr (0.1 on ranks 0 and 3, 0.5 on ranks 1 and 2)" in found
    assert 'rule ("sll" on ranks 0, 1 and 2, "sid" on rank 3)' in found
    assert "none on rank 1" in difference({0: same, 1: {"lr": 0.1}})  # what one rank alone knows of


LINES = ["a,b,label\n"] + [f"{i},{i % 5},{'xy'[i % 2]}\n" for i in range(40)]


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ("samples", ["the samples of "]),
        ("options", ['--rule ("sll" on rank 0', "--model.width (8 on rank 0", "--train-samples (null on rank 0"]),
        ("mode", ["--parallel ("]),
        pytest.param("versions", ["the version of torch (", "the version of layerwise ("], marks=pytest.mark.slow),
        pytest.param("resume", ["--resume (false on rank 0, true on rank 1)"], marks=pytest.mark.slow),
    ],
)
def test_all_ranks_tell_in_what_they_differ(change, sentences, tmp_path):
    words = [*DATA, *split("--data table.csv --model.width 8 --batch-size 4 --steps 2 --threads 1 --device cpu")]

    def rank():
        number = int(os.environ["RANK"])
        folder = tmp_path / str(number)
        folder.mkdir()
        os.chdir(folder)
        lines, given = list(LINES), list(words)
        if number and change == "samples":
            # Columns keep their means and deviations, and rows their labels: only the pairing of values differs.
            one, two = (lines[row].split(",", 1) for row in (3, 5))
            lines[3], lines[5] = f"{two[0]},{one[1]}", f"{one[0]},{two[1]}"
        (folder / "table.csv").write_text("".join(lines))
        if number:
            if change == "options":
                given += split("--rule local_ce --model.width 9 --train-samples 20")
            if change == "mode":
                given[given.index("data")] = "pipeline"
            if change == "versions":
                torch.__version__, layerwise.__version__ = "0.1", "0.0.1"
            if change == "resume":
                (folder / "run").mkdir()
                (folder / "run" / "config.json").write_text(json.dumps(to_mapping(TrainOptions())))
                given = [*DATA, "--resume", "run"]
        return main(given)

    codes, errors = run(2, tmp_path / "job", rank)
    assert codes == [2, 2], errors
    assert len(set(errors)) == 1  # the same sentence, from every rank
    assert errors[0].startswith("layerwise: the ranks differ in ") and errors[0].count("\n") == 1
    assert all(sentence in errors[0] for sentence in sentences), errors[0]
    for number in (0, 1):
        assert not (tmp_path / str(number) / "runs").exists()


def test_a_checkpoint_of_the_same_step_is_not_the_same_checkpoint(tmp_path):
    facts = []
    for weight in (1.0, 2.0):
        folder = tmp_path / str(weight)
        checkpoint.save(folder / "checkpoints", 3, {"w": torch.tensor([weight]), "steps": 3})
        facts.append(facts_of_checkpoint(folder))
    assert "the checkpoint" in difference(dict(enumerate(facts)))
    assert difference({0: facts[0], 1: dict(facts[0])}) is None
    assert "null on rank 1" in difference({0: facts[0], 1: facts_of_checkpoint(tmp_path / "nowhere")})


def test_images_that_are_decoded_on_demand_are_compared_byte_by_byte(tmp_path):
    def source(name, last):
        folder = tmp_path / name
        for kind in ("cat", "dog"):
            (folder / kind).mkdir(parents=True)
            for i in range(3):
                (folder / kind / f"{i}.png").write_bytes(bytes([i] * 8))
        (folder / "dog" / "1.png").write_bytes(bytes([1] * 7 + [last]))
        return StreamedSource(
            FileRows(folder, sorted(folder.rglob("*.png"))), torch.arange(6) // 3, ImageFormat("L", 2, 4)
        )

    one, same, other = source("one", 1), source("same", 1), source("other", 2)
    assert digest_of_samples(one) == digest_of_samples(same) != digest_of_samples(other)
    # Which samples are a part's own counts, and their order.
    assert digest_of_samples(one.subset(torch.tensor([0, 1]))) != digest_of_samples(one.subset(torch.tensor([1, 0])))


class Wider(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("change", ["model", "rule", "option"])
def test_learners_that_differ_are_told_before_the_first_broadcast(change, tmp_path):
    """In a loop of the user's own, where no command line is compared."""

    def rank():
        ranks = Ranks(10, torch.device("cpu"))
        changed = ranks.rank and change
        rule = "local_ce" if changed == "rule" else "sll"
        model = Wider(7 if changed == "model" else 6)
        try:
            Learner(
                model,
                rule,
                replicas=Replicas(ranks),
                example=torch.zeros(4, 5),
                clip=0.5 if changed == "option" else None,
            )
        except LayerwiseError as error:
            print(error)
            sys.stdout.flush()
            os._exit(2)

    codes, errors = run(2, tmp_path / "job", rank)
    assert codes == [2, 2], errors
    told = {(tmp_path / "job" / f"out{number}").read_text() for number in (0, 1)}
    (sentence,) = told
    what = {"model": "the tensors of the model", "rule": "the rule (", "option": "clip (null on rank 0, 0.5 on rank 1)"}
    assert what[change] in sentence


# Nothing that arrives is run as code.


@pytest.mark.slow
def test_no_module_knows_how_to_unpickle():
    modules = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.distributed.checkpoint"}
    names = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
    names |= {"send_object_list", "recv_object_list"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Attribute):
                assert node.attr not in names, (file, node.attr)
                assert ast.unparse(node) not in ("torch.load", "np.load") or "allow_pickle=False" in file.read_text()
                continue
            else:
                continue
            assert not any(name == module or name.startswith(module + ".") for name in found for module in modules), (
                file,
                found,
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "words"),
    [(2, SHARDED), (4, [*PIPELINE, "--replicas", "2"])],
    ids=["sharded", "mesh"],
)
def test_nothing_is_unpickled_in_a_run(ranks, words, tmp_path):
    def rank():
        class Refusing:
            def __init__(self, *arguments, **options):
                raise AssertionError("something is unpickled")

        sys.addaudithook(lambda event, _: Refusing() if event == "pickle.find_class" else None)
        pickle.loads = pickle.load = pickle.Unpickler = dist.distributed_c10d._unpickler = Refusing
        return main([*words, *TINY, "--save-every", "3", "--out", str(tmp_path / "out")])

    codes, errors = run(ranks, tmp_path / "job", rank)
    assert codes == [0] * ranks, errors
    assert (tmp_path / "out" / "result.json").exists()


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("key", ["greeting/1", "agreed/1/1"])
@pytest.mark.parametrize("disguise", ["raw", "hex", "json"])
def test_what_a_stranger_writes_into_the_store_is_not_run(key, disguise, tmp_path, monkeypatch):
    """A stranger takes the place of rank 1, and writes what would create a file if it was unpickled."""
    data = pickle.dumps(Payload(tmp_path / "ran"))
    text = {"raw": data, "hex": data.hex(), "json": f'["{data.hex()}"]'}[disguise]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set(f"attempt/0/{key}", text)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = object.__new__(Ranks)
    monkeypatch.setattr(Ranks, "_part", lambda *_: None)
    ranks.job = Job.from_environment()
    ranks.rank, ranks.count, ranks.blocks, ranks.agreed = 0, 2, [], 0
    ranks.limit = datetime.timedelta(seconds=2)
    ranks.store = StoreClient(dist.PrefixStore("attempt/0", store), 2)
    with pytest.raises(LayerwiseError, match="holds a value that no rank has written"):
        ranks._greet() if key.startswith("greeting") else ranks.agree(None)
    assert not (tmp_path / "ran").exists()


def test_values_travel_as_they_are():
    tree = {"a": (1, 2.5, None), 3: [True, "text", float("inf")], "empty": {}, "nested": ((), [], ("tuple",))}
    assert decode(encode(tree)) == tree
    assert [type(v) for v in decode(encode(tree))["nested"]] == [tuple, list, tuple]
    numbers = [0.1, -0.0, 1e-320, 2**70, float("nan")]
    assert list(map(repr, decode(encode(numbers)))) == list(map(repr, numbers))
    spec = decode(encode(torch.zeros(2, 3, dtype=torch.bfloat16).t()))
    assert spec == TensorSpec((3, 2), (1, 3), torch.bfloat16)
    for value in (object(), {1, 2}, b"bytes", torch.float32, Payload("x")):
        with pytest.raises(LayerwiseError, match="cannot be sent to another rank"):
            encode(value)
    for data in (
        b"",
        b"\x80\x04.",
        b'["tensor",[1],[1],"load"]',
        b'["tensor",[-1],[1],"float32"]',
        b'["code"]',
        b"[[]]",
    ):
        with pytest.raises(LayerwiseError, match="is damaged"):
            decode(data)


def test_the_store_of_a_local_job_listens_at_the_loopback_address_alone(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "job"
    with job(2, folder, [*DATA, *LONG, "--out", str(out)], variables=own_store(2)) as processes:
        under_way(out, processes)
        own = {inode for process in processes for inode in inodes(process.pid)}
        own -= inodes(os.getpid())  # which the ranks were forked off
        found = [address for address, inode in listening() if inode in own]
    # The store of rank 0, and gloo's sockets of both.
    assert len(found) >= 3
    assert all(address in ("0100007F", "0" * 24 + "01000000") for address in found), found


def inodes(pid):
    return {match[1] for link in open_files(pid) if (match := re.match(r"socket:\[(\d+)\]", link))}


def listening():
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                yield words[1].partition(":")[0], words[9]


def test_a_socket_listens_where_it_is_told():
    with listen("127.0.0.1", 0) as server:
        address, port = server.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(LayerwiseError, match=f"port {port} of 127.0.0.1 is in use"):
            listen("127.0.0.1", port)


# Under torchrun.


@pytest.mark.slow
def test_under_torchrun_the_sentence_comes_last(tmp_path, monkeypatch):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "layerwise",
    ]
    command += [*DATA, *TINY, "--batch-size", "127"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode != 0
    *_, told, border = done.stderr.strip().splitlines()
    # Nothing is below it but torchrun's border.
    assert "layerwise: 2 replicas cannot share a batch of 127 samples equally" in told
    assert set(border) == {"="}
    assert not contents(tmp_path)


def test_torchrun_learns_of_a_mistake_that_is_made_before_the_ranks_meet(tmp_path, monkeypatch, capsys):
    """torchrun reads the file: a message, and when."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main([*DATA, "--rule", "nothing"]) == 2
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == capsys.readouterr().err.strip()
    assert abs(int(message["extraInfo"]["timestamp"]) - time.time()) < 60
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert main([*DATA, "--rule", "nothing"]) == 2


# Who writes what.


def test_each_tensor_is_written_once_and_the_work_is_shared():
    def whole(name, size):
        return LocalTensor(name, (size,), (0,), (size,), 4 * size)

    everyone = [[whole(f"w{i}", 10) for i in range(6)] + [whole(f"own{rank}", 5)] for rank in range(3)]
    writers = shared_out(everyone)
    assert sorted(writers) == sorted([f"w{i}" for i in range(6)] + ["own0", "own1", "own2"])
    assert [writers[f"own{rank}"] for rank in range(3)] == [0, 1, 2]
    assert sorted(writers.values()).count(0) == sorted(writers.values()).count(1) == 3
