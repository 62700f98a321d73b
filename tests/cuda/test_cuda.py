"""What holds on the CPU holds on CUDA: bits, mathematics, flat memory, offloading; no step waits for the device."""

import copy

import pytest
import torch
from support.nets import batches, by_parameter, kinds, made, net, same_bits, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise import LanguageModel, Learner, rule_names, rules
from layerwise.cli.main import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RULES = rule_names()
DEVICE = "cuda"
DATA = batches(4)
every_rule_and_model = pytest.mark.parametrize(
    ("rule", "kind"), [(rule, kind) for rule in RULES for kind in kinds(rule)]
)
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """cuDNN and scatter-add choose kernels whose sums have no order unless they are told."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def on(device, rule, kind, data=DATA, double=False, **options):
    model = net(kind).double() if double else net(kind)
    learner = Learner(model.to(device), made(rule), example=data[0][0].to(device, model_type(double)), **options)
    for x, y in data:
        learner.step(x.to(device, model_type(double)), y.to(device))
    return learner


def model_type(double):
    return torch.float64 if double else torch.float32


class Draws(TorchDispatchMode):
    """Whether random numbers are drawn on the model's device: these differ between the kinds of device."""

    def __init__(self):
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return out


@every_rule_and_model
def test_the_same_bits_twice(rule, kind):
    assert same_bits(on(DEVICE, rule, kind), on(DEVICE, rule, kind))


@every_rule_and_model
def test_a_state_goes_on_with_the_same_bits(rule, kind):
    whole, first = on(DEVICE, rule, kind), on(DEVICE, rule, kind, DATA[:2])
    second = Learner(net(kind).to(DEVICE), made(rule), example=DATA[0][0].to(DEVICE))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for x, y in DATA[2:]:
        second.step(x.to(DEVICE), y.to(DEVICE))
    assert same_bits(whole, second)


@every_rule_and_model
def test_the_mathematics_is_that_of_the_cpu(rule, kind):
    if kind.startswith("noprop"):
        pytest.skip("its models compute in float32")
    with Draws() as draws:
        host = on("cpu", rule, kind, double=True)
    if draws.found:
        pytest.skip("draws random numbers on the device in its steps")
    there = on(DEVICE, rule, kind, double=True)
    for part in ("network", "auxiliary"):
        found = tensors(getattr(there, part))
        for name, value in tensors(getattr(host, part)).items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-6, atol=1e-8, msg=f"{part} {name}")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rules.get(rule).flat_memory])
def test_memory_does_not_grow_with_depth(rule):
    kind = kinds(rule)[0]
    if rule == "predsim":
        pytest.skip("its readouts are wider than these blocks, of which it warns")
    wide = {"width": 256} if kind in ("mlp", "sid_cascade") else {}
    used = []
    for depth in (4, 12):
        x, y = batches(1, 64)[0]
        learner = Learner(net(kind, depth, **wide).to(DEVICE), made(rule), example=x.to(DEVICE))
        for _ in range(2):
            learner.step(x.to(DEVICE), y.to(DEVICE))
        use = learner.measured_step(x.to(DEVICE), y.to(DEVICE))[1]
        used.append(use.activations + use.gradients)
    assert used[1] <= 1.05 * used[0] + 8192, used


@every_rule
def test_a_step_does_not_wait_for_the_device(rule):
    x, y = (tensor.to(DEVICE) for tensor in DATA[0])
    learner = Learner(net(kinds(rule)[0]).to(DEVICE), made(rule), example=x)
    for _ in range(2):
        learner.step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offloaded_activations_have_the_same_bits():
    model = net("mlp", 6).to(DEVICE)
    found = []
    for rule in ("backprop", "backprop_offload", "backprop_checkpoint", "backprop_fused"):
        learner = Learner(copy.deepcopy(model), rule)
        for x, y in DATA:
            learner.step(x.to(DEVICE), y.to(DEVICE))
        found.append(learner)
    assert all(same_bits(found[0].network, other.network) for other in found[1:])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@every_rule
def test_half_precision(rule, precision):
    if precision == "fp16" and by_parameter(rule):
        pytest.skip("updates one parameter at a time, and a gradient scaler needs all gradients at once")
    learner = on(DEVICE, rule, kinds(rule)[0], DATA * 2, precision=precision)
    assert all(torch.isfinite(value).all() for value in tensors(learner.network).values() if value.is_floating_point())
    x = DATA[0][0].to(DEVICE)
    assert learner(x).isfinite().all()


@pytest.mark.parametrize("rule", ["sll", "local_ce", "backprop"])
@pytest.mark.parametrize("options", [{"channels_last": True}, {"micro": 2}, {"accumulate": 2}, {"clip": 1.0}])
def test_options(rule, options):
    kind = "vit" if "micro" in options else "vgg"
    assert same_bits(*(on(DEVICE, rule, kind, **options) for _ in range(2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("rule", ["sll", "local_ce"])
def test_compiled_blocks(rule):
    plain, compiled = on(DEVICE, rule, "mlp"), on(DEVICE, rule, "mlp", compile=True)
    for name, value in tensors(plain.network).items():
        torch.testing.assert_close(tensors(compiled.network)[name], value, rtol=1e-3, atol=1e-4)


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    for rule in ("sll", "local_ce", "solo"):
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            learner = Learner(
                transformers.LlamaForCausalLM(config).to(DEVICE), rule, cuts="model.layers.*", task=LanguageModel()
            )
            tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
            for _ in range(3):
                learner.step({"input_ids": tokens}, tokens)
            found.append(learner)
        assert same_bits(*found)


RUN = ["train", "--data", "digits", "--model", "mlp", "--model.width", "32", "--device", DEVICE]


@pytest.mark.parametrize("rule", ["sll", "sid", "backprop"])
def test_a_run_has_the_same_bits_and_is_read_on_the_cpu(rule, tmp_path, capsys):
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        assert main([*RUN, "--rule", rule, "--steps", "20", "--out", str(place)]) == 0, capsys.readouterr().err
    one, two = ((place / "model.safetensors").read_bytes() for place in places)
    assert one == two
    assert main(["eval", str(places[0]), "--device", "cpu"]) == 0, capsys.readouterr().err
