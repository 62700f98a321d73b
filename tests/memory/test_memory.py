"""The memory meter against closed forms, and against the allocator's own record of a whole step."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from layerwise import models
from layerwise.errors import LayerwiseError
from layerwise.memory.meter import MemoryMeter, MemoryUse, measure_memory, optimizer_tensors, tensor_bytes

N = 1000


def activations(step, **given):
    return measure_memory(step, **given).activations


@pytest.fixture
def x():
    return torch.ones(N)


def test_tensor_bytes_counts_a_storage_once(x):
    assert tensor_bytes([]) == 0
    assert tensor_bytes([x, x[3:], x.view(10, -1), torch.zeros(7, dtype=torch.float64)]) == 4056
    assert tensor_bytes([torch.ones(2, 2).to_sparse()]) == 0


def test_one_operation_makes_one_buffer(x):
    assert activations(lambda: x * 2) == 4 * N
    assert activations(lambda: x.double()) == 8 * N
    assert activations(lambda: None) == 0


def test_views_and_in_place_operations_add_nothing(x):
    assert activations(lambda: x.view(10, 100).t()[3:].unsqueeze(0).expand(5, -1, -1)) == 0
    assert activations(lambda: x.mul_(2).relu_()) == 0
    assert activations(lambda: (x * 2).view(10, 100).t().detach().add_(1)) == 4 * N


def test_a_chain_holds_two_buffers(x):
    def chain():
        h = x
        for _ in range(50):
            h = h + 1

    assert activations(chain) == 2 * 4 * N


def test_a_view_keeps_its_storage_and_a_dead_one_lowers_the_count(x):
    def kept():
        view = (x * 2)[:1]
        other = x * 3
        return view, other

    def freed():
        view = (x * 2)[:1]
        del view
        return x * 3

    assert activations(kept) == 8 * N
    assert activations(freed) == 4 * N


def test_storages_are_followed_when_their_size_changes(x):
    def grows_by_an_operation():
        h = torch.empty(10)
        h.resize_(N)

    def grows_unseen():
        h = torch.empty(10)
        h.untyped_storage().resize_(8 * N)
        h.add_(1)

    def shrinks():
        h = x * 2
        h.untyped_storage().resize_(0)
        h.detach()
        return x * 3

    assert activations(grows_by_an_operation) == 4 * N
    assert activations(grows_unseen) == 8 * N
    assert activations(shrinks) == 4 * N


def test_tensors_from_outside_an_operation_count():
    assert activations(lambda: torch.tensor([1.0] * N)) == 4 * N
    assert activations(lambda: torch.empty(0).set_(torch.UntypedStorage(4 * N))) == 4 * N


def test_what_was_there_before_counts_only_when_given(x):
    assert activations(lambda: x.view(-1)) == 0
    assert activations(lambda: x.view(-1), inputs=[x]) == 4 * N
    assert activations(lambda: x * 2, inputs=[x, x[1:]]) == 8 * N


def test_other_devices_are_not_counted():
    elsewhere = torch.empty(N, device="meta")
    use = measure_memory(lambda: elsewhere + 1, parameters=[elsewhere], inputs=[elsewhere])
    assert use == MemoryUse(0, 0, 0, 0, 0)


def test_gradients_of_a_linear_layer():
    layer = nn.Linear(30, 20)
    batch = torch.ones(5, 30)
    use = measure_memory(lambda: layer(batch).sum().backward(), parameters=layer.parameters())
    assert use.parameters == 4 * (30 * 20 + 20)
    assert use.gradients == 4 * (30 * 20 + 20)
    # The largest moment is the last: both gradients, and the sum with its expanded gradient of one.
    assert use.activations == 8
    assert use.peak == use.parameters + use.gradients + use.activations


def test_gradients_from_before_and_accumulated_ones_count_once():
    layer = nn.Linear(30, 20)
    batch = torch.ones(5, 30)
    layer(batch).sum().backward()
    use = measure_memory(lambda: None, parameters=layer.parameters())
    assert (use.gradients, use.activations) == (2480, 0)
    use = measure_memory(lambda: layer(batch).sum().backward(), parameters=layer.parameters())
    # The layer's new gradients are temporaries beside the old ones.
    assert (use.gradients, use.activations) == (2480, 2480 + 8)


def test_gradients_set_by_hand_are_noticed_by_the_optimizer():
    layer = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)

    def step():
        layer.weight.grad = torch.zeros(20, 30)
        optimizer.step()

    use = measure_memory(step, parameters=layer.parameters())
    assert (use.gradients, use.activations) == (2400, 0)


# Beside the gradients: fused updates in place, so backward holds the most (the batch, the sum and
# its gradient of one); foreach makes the denominators of all parameters, plain twice the weight's.
@pytest.mark.parametrize(
    ("how", "beside"),
    [({"fused": True}, 600 + 8), ({"foreach": True}, 2480), ({"foreach": False}, 2 * 2400)],
)
def test_adam_keeps_two_moments_and_a_step_counter(how, beside):
    layer = nn.Linear(30, 20)
    optimizer = torch.optim.Adam(layer.parameters(), **how)

    def step():
        layer(torch.ones(5, 30)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    # The state is the same whether the measured step made it or found it.
    for _ in range(2):
        use = measure_memory(
            step,
            parameters=layer.parameters(),
            optimizer_state=lambda: optimizer_tensors([optimizer]),
        )
        assert use.optimizer == 2 * 2480 + 2 * 4
        assert (use.gradients, use.activations) == (2480, beside)


def test_state_that_is_a_parameter_counts_as_parameter(x):
    use = measure_memory(lambda: None, parameters=[x], optimizer_state=lambda: [x, torch.ones(3)])
    assert (use.parameters, use.optimizer) == (4 * N, 12)


class Step:
    """One forward and backward of an MLP of equal layers; what it saves can be counted by hand."""

    batch, width = 64, 16

    def __init__(self, depth, in_place=False):
        layers = []
        for _ in range(depth):
            layers += [nn.Linear(self.width, self.width), nn.ReLU(in_place)]
        self.net = nn.Sequential(*layers)
        self.x = torch.randn(self.batch, self.width)

    def backprop(self):
        self.net(self.x).sum().backward()
        self.net.zero_grad()

    def isolated(self):
        h = self.x
        for linear, relu in zip(self.net[::2], self.net[1::2], strict=True):
            h = relu(linear(h.detach()))
            h.sum().backward()
            linear.zero_grad()

    def checkpointed(self):
        h = self.x.clone().requires_grad_()
        for linear, relu in zip(self.net[::2], self.net[1::2], strict=True):
            # The generator's state would be a tensor that no operation makes.
            h = checkpoint(nn.Sequential(linear, relu), h, use_reentrant=False, preserve_rng_state=False)
        h.sum().backward()
        self.net.zero_grad()

    def measure(self, run):
        return measure_memory(run, parameters=self.net.parameters())


@pytest.mark.parametrize("in_place", [False, True])
def test_backprop_saves_one_buffer_per_layer(in_place):
    # Autograd keeps the output of each ReLU, which is also the input of the next linear layer; the
    # linear layer's own output dies with the ReLU (in place it is the same storage). L layers hold
    # L buffers after the forward pass. A layer's gradient takes about a quarter of a buffer (batch
    # over width is 4), less than the one that backward then frees, so the slope is one buffer.
    buffer = 4 * Step.batch * Step.width
    total = {}
    for depth in (2, 4, 16, 64):
        step = Step(depth, in_place)
        use = step.measure(step.backprop)
        total[depth] = use.gradients + use.activations
    assert total[4] - total[2] == 2 * buffer
    assert total[16] - total[4] == 12 * buffer
    assert total[64] - total[16] == 48 * buffer


def test_isolated_blocks_do_not_grow_with_depth():
    few, many = Step(4), Step(64)
    assert few.measure(few.isolated).activations == many.measure(many.isolated).activations
    assert few.measure(few.isolated).gradients == many.measure(many.isolated).gradients
    assert many.measure(many.isolated).parameters == 16 * few.measure(few.isolated).parameters


def replayed(step):
    """Peak of the allocator's own events in a step that begins and ends with the same memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = largest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            largest = max(largest, now)
    assert now == 0
    return largest


@pytest.mark.parametrize("way", ["backprop", "isolated", "checkpointed"])
@pytest.mark.parametrize("depth", [1, 5])
def test_the_peak_is_the_allocators(depth, way):
    step = Step(depth)
    run = getattr(step, way)
    run()
    use = step.measure(run)
    assert use.gradients + use.activations == replayed(run)


@pytest.mark.parametrize("name", ["mlp", "resnet", "sid_cascade", "vgg", "vit"])
def test_the_peak_is_the_allocators_for_every_model(name):
    torch.manual_seed(0)
    model = models.create(name, (1, 8, 8), 10, depth=3, width=24)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10

    def step():
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    use = measure_memory(
        step,
        parameters=[*model.parameters(), *model.buffers()],
        optimizer_state=lambda: optimizer_tensors([optimizer]),
    )
    if name in ("mlp", "vit"):
        assert use.gradients + use.activations == replayed(step)
    else:  # the kernels of small convolutions take workspace
        assert use.gradients + use.activations <= replayed(step)
    assert use.parameters == tensor_bytes(model.state_dict().values())


def test_a_meter_leaves_nothing_behind(x):
    layer = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    meter = MemoryMeter(parameters=layer.parameters())

    def fail():
        with meter:
            kept = x * 2
            kept[N]

    with pytest.raises(IndexError):
        fail()
    assert meter.peak.activations == 4 * N
    layer(torch.ones(5, 30)).sum().backward()
    optimizer.step()
    assert meter.peak.activations == 4 * N
    assert not layer.weight._post_accumulate_grad_hooks
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_meters_nest(x):
    with MemoryMeter() as outer:
        h = x * 2
        with MemoryMeter() as inner:
            h = h + 1
    del h
    assert outer.peak.activations == 8 * N
    assert inner.peak.activations == 4 * N


def test_mib():
    use = MemoryUse(parameters=2**20, optimizer=2**21, gradients=2**19, activations=0, peak=0)
    assert use.mib() == {
        "parameters": 1.0,
        "optimizer": 2.0,
        "gradients": 0.5,
        "activations": 0.0,
        "peak": 0.0,
    }


@pytest.mark.parametrize("device", ["hpu", "meta", "nonsense", torch.device("meta")])
def test_a_device_that_cannot_be_measured(device):
    with pytest.raises(LayerwiseError, match="choose one that"):
        measure_memory(lambda: None, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device():
    with pytest.raises(LayerwiseError, match="device 'cuda:0' cannot be used"):
        MemoryMeter(device="cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_closed_forms():
    layer = nn.Linear(256, 256, device="cuda")
    batch = torch.ones(1024, 256, device="cuda")

    def step():
        layer(batch).sum().backward()
        layer.zero_grad()

    step()
    use = measure_memory(step, parameters=layer.parameters(), device="cuda")
    assert use.parameters == use.gradients == 4 * 257 * 256
    assert use.activations >= 4 * 1024 * 256


def test_reading_too_early():
    meter = MemoryMeter()
    with pytest.raises(LayerwiseError, match="read `peak` after its `with` block"):
        _ = meter.peak
