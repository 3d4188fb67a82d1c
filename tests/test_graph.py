"""Steps that are recorded and replayed, on a CPU with a stand-in for the CUDA graph.

The stand-in notes the operators of one call and repeats them on the same memory, without Python: what a step
keeps in Python, or allocates anew without writing it at every call, goes wrong as it would on a GPU.
"""

import dataclasses
import importlib
import warnings

import pytest
import torch
from conftest import digits_problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim4dd import distill, evaluation, graph, networks, stacked
from mim4dd.objectives import (
    METHODS,
    Matched,
    MutualInformation,
    Objective,
    ThroughTermNetworks,
    TrainedOnSynthetic,
    term_networks,
)
from mim4dd.seeding import generator

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


class Recorder(TorchDispatchMode):
    """Notes every operator with the tensors it was given and gave; refuses to draw from other generators."""

    def __init__(self, generators):
        super().__init__()
        self.operators, self.generators = [], generators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for random in tree_leaves((args, kwargs)):
            if isinstance(random, torch.Generator):  # a new object for the same generator
                assert any(torch.equal(random.get_state(), own.get_state()) for own in self.generators)
        result = func(*args, **(kwargs or {}))
        self.operators.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def repeat(self):
        for func, args, kwargs, result in self.operators:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(step, inputs, generators, device):
    held = [tensor.clone() for tensor in inputs]
    # As on a GPU, the recording itself leaves everything as it was; only for generators it takes doing.
    states = [random.get_state() for random in generators]
    recorder = Recorder(generators)
    calls = []

    def replay(*inputs):
        for kept, given in zip(held, inputs, strict=True):
            kept.copy_(given)
        if calls:
            recorder.repeat()
        else:  # the first replay is the recording
            for random, state in zip(generators, states, strict=True):
                random.set_state(state)
            with recorder:
                calls.append(step(*held))
        return calls[0]

    return replay


@pytest.fixture
def stand_in(monkeypatch):
    """Have steps replayed on the CPU; return how many recordings were made."""
    made = []

    def counted(*arguments):
        made.append(arguments)
        return record(*arguments)

    monkeypatch.setattr(graph, "_record", counted)
    monkeypatch.setattr(graph, "_aside", lambda step, inputs, device: step(*inputs))
    for module in (distill, stacked):
        monkeypatch.setattr(module, "replayed", graph.Replayed)
    monkeypatch.setattr(stacked, "FUSED", {"cpu"})
    # What a GPU's Adam does is not for CPUs, though it runs there.
    adams = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adams, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, capturable: adams.Adam(groups, capturable=True))
    return made


def distilled(method, tmp_path, device="cpu", iterations=9, **changes):
    problem, start = digits_problem(ipc=2)
    trajectory = dataclasses.replace(problem.trajectory, experts=tmp_path)
    # One part: a choice among several is looked at on a CPU, and would be the recorded one for ever.
    problem = dataclasses.replace(
        problem,
        real=problem.real.to(device),
        labels=problem.labels.to(device),
        layers=(0, 1),
        augmentation="none" if method == "dc" else "crop",
        trajectory=trajectory,
        memory=10**9 if method == "mtt" else None,  # so that the graphs of its steps are kept
    )
    start = dataclasses.replace(start.to(device), **changes)
    looks = []
    objective = METHODS[method].objective(problem)
    if method in ("dc", "dsa"):
        objective.outer, objective.inner = 5, 2  # so that a new network comes in after the recording
    sizes = problem.network().feature_sizes
    projected = {"projection": "trained", "projection_size": 8, "feature_sizes": sizes}
    random = generator(0, "projection", device)
    term = MutualInformation(weight=1.0, layers="all", generator=random, **projected)
    settings = {"iterations": iterations, "lr": METHODS[method].image_lr[1], "momentum": 0.5}
    result = distill.distill(objective, start, mutual_information=term, on_progress=looks.append, **settings)
    return result, [look.terms for look in looks]


@pytest.mark.parametrize("method", METHODS)
def test_a_replayed_distillation_is_the_same(method, stand_in, tmp_path, monkeypatch):
    replayed, looks = distilled(method, tmp_path)
    # Experts, where there are any; the inner step, where there is one; the image step.
    assert len(stand_in) == {"mtt": 3, "dc": 2, "dsa": 2}.get(method, 1)
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    plain, plain_looks = distilled(method, tmp_path)
    assert torch.equal(replayed.images, plain.images)
    assert looks == plain_looks


@pytest.fixture
def short_students(monkeypatch):
    monkeypatch.setattr(term_networks, "STUDENT_EVERY", 3)
    monkeypatch.setattr(term_networks, "STUDENT_EPOCHS", (4, 6))


def test_students_are_replayed_too(stand_in, short_students, monkeypatch):
    replayed, _ = with_students()
    assert len(stand_in) == 2, "the image step, and the student's step once for all students"
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    assert torch.equal(replayed, with_students()[0])


def with_students(device="cpu", **from_there):
    """The images after 15 iterations of dm with the default term, and the looks at them."""
    problem, start = digits_problem()
    real, labels = problem.real.to(device), problem.labels.to(device)
    problem = dataclasses.replace(problem, real=real, labels=labels, layers=(0, 1), augmentation="crop")
    objective = ThroughTermNetworks(TrainedOnSynthetic(problem), METHODS["dm"].objective(problem), problem)
    term = MutualInformation(loss="info_nce", weight=10.0, layers="all", temperature=0.03)
    looks = []
    settings = {"iterations": 15, "lr": 1.0, "momentum": 0.5, "mutual_information": term}
    made = distill.distill(objective, start.to(device), on_progress=looks.append, **settings, **from_there)
    return made.images, looks


def test_a_replayed_run_that_was_cut_off_goes_on_as_if_it_had_not_been(stand_in, short_students):
    whole, (first, _) = with_students()
    rest, _ = with_students(state=first.state)
    assert len(stand_in) == 4, "the rest is long enough to be recorded, too"
    assert torch.equal(rest, whole)


def test_learned_soft_labels_are_replayed_too(stand_in, tmp_path, monkeypatch):
    soft = torch.full((20, 10), 0.02)
    soft[torch.arange(20), torch.arange(10).repeat_interleave(2)] = 0.82
    replayed, _ = distilled("dsa", tmp_path, soft_labels=soft)
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    plain, _ = distilled("dsa", tmp_path, soft_labels=soft)
    assert torch.equal(replayed.soft_labels, plain.soft_labels)
    assert not torch.equal(replayed.soft_labels, soft)


def trained(device="cpu", architecture="convnet", augmentation="crop"):
    """Fifty images in batches of 16, 16, 16 and 2, for six epochs."""
    problem, start = digits_problem(ipc=5)
    random = generator(0, "training", device)
    network = networks.create(architecture, 1, 10, (8, 8), width=8, device=device)
    networks.initialise(network, random)
    protocol = evaluation.Protocol(epochs=6, augmentation=augmentation, batch=16)
    pair = start.images.to(device), problem.labels.to(device)
    evaluation.train(stacked.Stack.of(network, random), [pair], protocol)
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


@pytest.mark.parametrize("architecture", ["convnet", "convnet-bn"])
def test_replayed_training_is_the_same(architecture, stand_in, monkeypatch):
    replayed = trained(architecture=architecture)
    # One for each size of a batch, whatever the learning rate.
    assert [index.shape[1] for _, (index,), *_ in stand_in] == [16, 2]
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    assert torch.equal(replayed, trained(architecture=architecture))


def test_a_stack_is_replayed_with_the_draws_of_each(stand_in):
    problem, start = digits_problem()
    network = networks.create("mlp", 1, 10, (8, 8))
    stack = stacked.Stack.initialised(network, [generator(k, "training") for k in range(2)])
    pairs = [(start.images, problem.labels)] * 2
    evaluation.train(stack, pairs, evaluation.Protocol(epochs=3, augmentation="crop"))
    assert len(stand_in) == 1


def test_a_step_runs_once_and_is_then_replayed(stand_in):
    total, random, runs = torch.zeros(()), generator(0, "draws"), []

    def step(x, y):
        runs.append(1)
        total.add_(x + y.sum() + torch.rand((), generator=random))
        return total * 2

    replayed = graph.Replayed(step, [random], torch.device("cpu"))
    expected, draws = torch.zeros(()), generator(0, "draws")
    for k in range(8):
        for size in (2, 3):
            expected += 1 + k * size + torch.rand((), generator=draws)
            assert replayed(torch.ones(()), torch.full((size,), float(k))) == expected * 2
    assert len(stand_in) == 2, "one for each shape"
    assert len(runs) == 2 * 2, "for each shape once as it is, and once recorded"


def test_on_a_gpu_a_step_is_replayed_and_on_a_cpu_it_is_itself():
    random = generator(0, "draws")
    assert graph.replayed(print, [random], torch.device("cpu")) is print
    replayed = graph.replayed(print, [random], torch.device("cuda"))
    assert isinstance(replayed, graph.Replayed)
    assert (replayed.step, replayed.generators) == (print, [random])


def test_a_step_that_cannot_be_recorded_goes_on_with_a_warning(monkeypatch, stand_in):
    def refuse(*_):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nSearch for ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graph, "_record", refuse)
    replayed = graph.Replayed(lambda x: x + 1, [], torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [replayed(torch.tensor(k)).item() for k in range(6)] == [1, 2, 3, 4, 5, 6]
    assert [str(w.message) for w in caught] == [
        "mim4dd: a step cannot be recorded as a CUDA graph and runs slower without one (operation not "
        "permitted when stream is capturing)"
    ]
    assert caught[0].filename == __file__, "where the step is called"


def test_of_several_shapes_each_is_tried_once(monkeypatch, stand_in):
    tried = []

    def refuse(step, inputs, *_):
        tried.append(inputs[0].shape)
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(graph, "_record", refuse)
    replayed = graph.Replayed(lambda x: x + 1, [], torch.device("cpu"))
    with pytest.warns(UserWarning, match="cannot be recorded"):
        found = [replayed(torch.ones(size)) for _ in range(8) for size in (2, 3)]
    assert torch.equal(torch.cat(found), torch.full((40,), 2.0))
    assert tried == [(2,), (3,)]


def test_an_objective_of_ones_own_is_never_recorded(stand_in):
    """It may count its calls: without generators, nothing says that it does the same at each."""

    class Counting(Objective):
        calls = 0

        def match(self, images, targets):
            self.calls += 1
            rows = images.flatten(1)
            return Matched(self.calls * rows.square().sum(), [rows], [rows.detach()], targets, targets)

    _, start = digits_problem()
    objective = Counting()
    distill.distill(objective, start, iterations=9, lr=1e-4, momentum=0.0)
    assert objective.calls == 9
    assert stand_in == []


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_gives_what_single_launches_give(method, device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*cannot be recorded")
        replayed, _ = distilled(method, tmp_path, device, iterations=6)
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    plain, _ = distilled(method, tmp_path, device, iterations=6)
    # A pixel moves by 0.2 and more from the third iteration to the sixth.
    torch.testing.assert_close(replayed.images, plain.images, rtol=0, atol=5e-3)


@pytest.mark.parametrize("device", [CUDA])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(device, short_students, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole, (first, _) = with_students(device)
    state = {name: tensor.cpu() for name, tensor in first.state.items()}  # as it comes from a file
    rest, _ = with_students(device, state=state)
    torch.testing.assert_close(rest, whole, rtol=0, atol=5e-3)


@pytest.mark.parametrize("device", [CUDA])
def test_training_by_a_graph_is_that_by_single_launches(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    replayed = trained(device, augmentation="color_crop_cutout_flip_scale_rotate")
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    plain = trained(device, augmentation="color_crop_cutout_flip_scale_rotate")
    torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", [CUDA])
def test_every_replay_draws_anew_and_as_without_a_graph(device):
    draws = []
    for warm_up in (graph.WARM_UP, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "WARM_UP", warm_up)
            random = generator(0, "draws", device)
            step = graph.replayed(
                lambda random=random: torch.rand(4, generator=random, device=device),
                [random],
                torch.device(device),
            )
            draws.append(torch.stack([step().clone() for _ in range(8)]))
    assert torch.equal(*draws)
    assert len(draws[0].unique(dim=0)) == 8


@pytest.mark.parametrize("device", [CUDA])
def test_the_first_replay_draws_as_without_a_graph_on_a_busy_gpu(device, monkeypatch):
    """What the recording does on its own stream comes late, as where other processes use the GPU.

    From torch 2.13 on it does nothing there that a replay could meet.
    """

    def draws():
        random = generator(0, "draws", device)
        step = graph.replayed(
            lambda: torch.rand(4, generator=random, device=device), [random], torch.device(device)
        )
        return torch.stack([step().clone() for _ in range(4)])

    def late(empty_cache=torch.cuda.empty_cache):  # torch calls it as the recording begins
        empty_cache()
        with torch.cuda.stream(graph._stream(torch.device(device))):
            torch.cuda._sleep(10**8)

    expected = draws()
    torch.cuda.synchronize()
    monkeypatch.setattr(torch.cuda, "empty_cache", late)
    assert torch.equal(draws(), expected)


@pytest.mark.parametrize("device", [CUDA])
def test_every_call_comes_after_what_was_asked_before_and_before_what_is_asked_next(device):
    """Whatever stream it is on, and however late that is."""

    def step(x):
        torch.cuda._sleep(10**8)
        return x + 1

    x, found = torch.zeros(1000, device=device), []
    replayed = graph.replayed(step, [], torch.device(device))
    for k in range(4):
        torch.cuda._sleep(10**8)
        x.fill_(k)
        found.append(replayed(x).clone())
    assert torch.equal(torch.stack(found), torch.arange(1.0, 5, device=device)[:, None].expand(4, 1000))


@pytest.mark.parametrize("device", [CUDA])
def test_a_failed_recording_leaves_the_draws_as_they_would_be(device):
    random, same = generator(0, "draws", device), generator(0, "draws", device)

    def step():
        drawn = torch.rand((), generator=random, device=device)
        return drawn + drawn.item()

    replayed = graph.replayed(step, [random], torch.device(device))
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        found = [replayed().item() for _ in range(6)]
    assert found == [2 * torch.rand((), generator=same, device=device).item() for _ in range(6)]


def test_what_was_recorded_before_a_failure_is_recorded_anew(monkeypatch, stand_in):
    """With the generators' states as they are now."""
    recorded = []

    def some(step, inputs, generators, device):
        if len(inputs[0]) == 3:
            raise RuntimeError("operation not permitted")
        recorded.append(len(inputs[0]))
        return lambda x: x + 1

    monkeypatch.setattr(graph, "_record", some)
    replayed = graph.Replayed(lambda x: x + 1, [], torch.device("cpu"))

    def replay(*sizes):
        for size in sizes:
            for _ in range(graph.WARM_UP + 1):
                replayed(torch.zeros(size))

    replay(2, 2)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        replay(3)
    replay(2)
    assert recorded == [2, 2]
