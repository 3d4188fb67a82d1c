import pytest
import torch
from conftest import close, prepared_match

from mim4dd import extension, networks
from mim4dd.data import load
from mim4dd.errors import InputError
from mim4dd.evaluation import Protocol, evaluate
from mim4dd.networks import memory, precision
from mim4dd.networks.precision import resolve
from mim4dd.objectives import METHODS
from mim4dd.run import main
from mim4dd.seeding import generator
from mim4dd.synthetic import initialise

CPU = torch.device("cpu")
HAS_BF16 = precision._has_bf16(CPU)


@pytest.mark.parametrize(
    ("capabilities", "plain", "with_compiled_convolutions"),
    [
        ({"avx512_bf16": True}, "bf16", "fp32"),
        ({"amx_bf16": True}, "bf16", "bf16"),
        ({"avx512_f": True}, "fp32", "fp32"),
        ({}, "fp32", "fp32"),
    ],
)
def test_auto_is_the_fastest_on_the_processor(monkeypatch, capabilities, plain, with_compiled_convolutions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for compiled, expected in ((False, plain), (True, with_compiled_convolutions)):
        monkeypatch.setattr(extension, "available", lambda compiled=compiled: compiled)
        assert resolve("auto", CPU) == expected
    assert resolve("fp32", CPU) == "fp32"
    if plain == "fp32":
        with pytest.raises(InputError, match=r"--precision bf16 would be emulated on this cpu"):
            resolve("bf16", CPU)
    else:
        assert resolve("bf16", CPU) == "bf16"


def test_what_cannot_be_is_refused_with_exit_code_2(capsys, tmp_path):
    assert main(["--quick", "--precision", "tf32", "--device", "cpu", "--out", str(tmp_path / "a")]) == 2
    assert "--precision tf32 needs an Ampere GPU or newer, not cpu" in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown precision 'bf17', did you mean bf16"):
        resolve("bf17", CPU)
    assert main(["--quick", "--memory-budget", "0.0"]) == 2
    assert "--memory-budget is 0.0" in capsys.readouterr().err


def test_only_tf32_rounds_to_tf32(monkeypatch):
    """What torch allows its convolutions by default."""
    for name, allowed in (("fp32", False), ("tf32", True), ("bf16", False)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
        precision.configure(name)
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.backends.cudnn.deterministic, "the same seed is to give the same set"


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
def test_maps_and_logits_are_float32_in_any_precision(architecture):
    """bfloat16 is emulated where the processor lacks it, so this runs everywhere."""
    results = []
    for name in ("fp32", "bf16"):
        network = networks.create(architecture, 3, 5, (16, 16), width=8, precision=name)
        networks.initialise(network, generator(0, "test"))
        x = torch.randn(4, 3, 16, 16, generator=generator(0, "x"))
        assert all(m.dtype == torch.float32 for m in network.features(x))
        results.append(network(x))
    exact, rounded = results
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    close(rounded, exact, 0.05)


def test_only_the_layers_asked_for_are_returned():
    network = networks.create("convnet", 1, 3, (16, 16), width=8)
    networks.initialise(network, generator(0, "test"))
    x = torch.randn(2, 1, 16, 16, generator=generator(0, "x"))
    every, some = network.features(x), network.features(x, {1})
    assert [m.numel() > 0 for m in some] == [False, True, False]
    assert torch.equal(some[1], every[1])


@pytest.mark.skipif(not HAS_BF16, reason="bfloat16 is emulated here")
@pytest.mark.parametrize(("method", "weight"), [("dm", "300"), ("dsa", "0")])
def test_accuracy_in_bf16_is_that_in_float32(method, weight, tmp_path):
    """Distilled and evaluated in either; the bound is twice the spread of the networks in float32."""
    import json

    scores = {}
    for name in ("fp32", "bf16"):
        out = tmp_path / f"{method}-{name}"
        options = (
            "--ipc 1 --iterations 30 --width 32 --real-batch 32 --num-eval 4 --eval-epochs 60 --baselines"
        )
        arguments = [*options.split(), "--method", method, "--mim-weight", weight, "--precision", name]
        assert main([*arguments, "--out", str(out)]) == 0
        result = json.loads((out / "result.json").read_text())
        assert result["config"]["precision"] == name
        scores[name] = result
    spread = max(2 * scores["fp32"]["accuracy_std"], 0.03)
    assert abs(scores["bf16"]["accuracy_mean"] - scores["fp32"]["accuracy_mean"]) < spread
    assert scores["bf16"]["accuracies"] != scores["fp32"]["accuracies"]


@pytest.mark.skipif(not HAS_BF16, reason="bfloat16 is emulated here")
def test_evaluation_in_bf16_repeats():
    real, test = load("digits")
    start = initialise(real, 2, "real", generator(0, "init"))
    protocol = Protocol(5, "color_crop", width=16, precision="bf16")
    first, second = (
        evaluate(lambda _: (start.images, start.labels), test, protocol, num_networks=2, seed=0)
        for _ in range(2)
    )
    assert first == second


def test_memory_of_a_derivative_by_the_images_is_predicted_from_shapes(monkeypatch):
    """On a GPU, where the first block's map of 128 x 32 x 32 and its patches of 9 pixels are made for it."""
    image, device = (1, 28, 28), torch.device("meta")
    on_cpu, on_gpu = (
        networks.create("convnet", 1, 10, image[1:], precision="bf16", device=place)
        for place in ("cpu", device)
    )
    assert memory.per_first_derivative(on_cpu, image, twice=True) == 0
    monkeypatch.setattr(memory, "kernels_run", lambda dtype, device: False)
    assert memory.per_first_derivative(on_gpu, image, twice=True) == 0
    monkeypatch.setattr(memory, "kernels_run", lambda dtype, device: True)
    maps, ends = (128 + 9) * 32 * 32, 28 * 28 + 128 * 16 * 16
    assert memory.per_first_derivative(on_gpu, image, twice=False) == 2 * (2 * maps + ends)
    assert memory.per_first_derivative(on_gpu, image, twice=True) == 2 * (4 * maps + ends)
    many_channels = networks.create("convnet", 64, 10, image[1:], precision="bf16", device=device)
    assert memory.per_first_derivative(many_channels, (64, 28, 28), twice=True) == 0


def test_memory_is_predicted_from_shapes(monkeypatch):
    """Of the ConvNet for 28x28: the first map, 128 x 32 x 32, is read and written at the normalisation.

    In the compiled first block there is no such map.
    """
    network = networks.create("convnet", 1, 10, (28, 28))
    half = networks.create("convnet", 1, 10, (28, 28), precision="bf16")
    first = 128 * 32 * 32 * 4
    maps = 128 * 16 * 16, 128 * 16 * 16, 128 * 8 * 8, 128 * 8 * 8, 128 * 4 * 4
    monkeypatch.setattr(extension, "available", lambda *_: True)
    assert memory.per_image(network, (1, 28, 28), gradients=False) == 4 * (maps[0] + maps[1])
    assert memory.per_image(network, (1, 28, 28), gradients=True) == 4 * sum(maps)
    assert memory.per_image(half, (1, 28, 28), gradients=False) == 2 * (maps[0] + maps[1])
    assert memory.per_image(half, (1, 28, 28), gradients=True) == 2 * sum(maps)
    monkeypatch.setattr(extension, "available", lambda *_: False)
    assert memory.per_image(network, (1, 28, 28), gradients=False) == 2 * first
    assert 3 * first < memory.per_image(network, (1, 28, 28), gradients=True) < 6 * first
    assert memory.per_image(half, (1, 28, 28), gradients=False) == first
    on_gpu = networks.create("convnet", 1, 10, (28, 28), precision="bf16", device=torch.device("meta"))
    assert memory.per_image(on_gpu, (1, 28, 28), gradients=False) == 3 * first, "normalised in float32"
    once, twice = (
        memory.per_image(on_gpu, (1, 28, 28), gradients=True, transformed=transformed)
        for transformed in (False, True)
    )
    assert once == memory.per_image(network, (1, 28, 28), gradients=True)
    assert twice == 3 * once, "and not fused with what is around it"
    monkeypatch.setattr(memory, "kernels_run", lambda dtype, device: True)
    assert memory.per_image(on_gpu, (1, 28, 28), gradients=False) == 2 * (maps[0] + maps[1])
    assert memory.per_image(on_gpu, (1, 28, 28), gradients=True) == 2 * sum(maps)
    wide = networks.create(
        "convnet", 1, 10, (28, 28), precision="bf16", device=torch.device("meta"), width=48
    )
    unfused = 2 * 48 * (32 * 32 + 16 * 16)
    assert memory.per_image(wide, (1, 28, 28), gradients=False) == unfused, "no first block in one of 48"
    assert memory.budget(None, CPU) is None
    assert memory.budget(2, torch.device("cuda")) == 2 << 30


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_changes_the_chunks_and_not_the_loss(method):
    """On the CPU a budget is only ever set here, to see the chunks of a GPU."""
    import dataclasses

    from conftest import digits_problem

    problem, start = digits_problem(ipc=3)
    losses = []
    for budget in (None, 1, 50_000):
        bounded = dataclasses.replace(problem, memory=budget)
        images = start.images.clone().requires_grad_()
        losses.append(prepared_match(METHODS[method].objective(bounded), images, problem.labels).loss)
    assert dataclasses.replace(problem, memory=1).chunk == 1
    assert 1 < dataclasses.replace(problem, memory=50_000).chunk < 32
    close(losses[1], losses[0])
    close(losses[2], losses[0])


@pytest.mark.parametrize("computing", ["fp32", "bf16"])
def test_integers_are_no_images(computing):
    network = networks.create("convnet", 1, 3, (8, 8), width=32, precision=computing)
    with pytest.raises(RuntimeError, match="Byte"):
        network(torch.ones(2, 1, 8, 8, dtype=torch.uint8))


def test_autocast_of_the_caller_is_left_alone():
    with torch.autocast("cpu", torch.bfloat16), precision.autocast("fp32", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "auto"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_what_a_gpu_computes_in(monkeypatch, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert resolve("auto", gpu) == auto
    for name in ("tf32", "bf16"):
        if auto == "bf16":
            assert resolve(name, gpu) == name
        else:
            with pytest.raises(InputError, match=f"--precision {name}"):
                resolve(name, gpu)


def test_a_network_whose_weights_are_bfloat16():
    network = networks.create("convnet", 3, 5, (16, 16), width=32)
    networks.initialise(network, generator(0, "w"))
    x = torch.randn(4, 3, 16, 16, generator=generator(0, "x"))
    expected = network(x)
    close(network.bfloat16().embed(x.bfloat16()), network.float().embed(x), 0.05)
    assert expected.isfinite().all()


def test_half_of_the_free_memory_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    assert memory.budget(None, torch.device("cuda")) == 6 << 30


def test_as_many_images_pass_as_fit(monkeypatch):
    network = networks.create("convnet", 1, 10, (8, 8), width=8)
    images = torch.zeros(100, 1, 8, 8)
    one = memory.per_image(network, (1, 8, 8), gradients=False)
    for free, count in ((one - 1, 1), (5 * one, 5), (100 * one, 32), (None, 32)):
        monkeypatch.setattr(memory, "budget", lambda *_, free=free: free)
        assert memory.chunk_size(network, images) == count


def test_a_torch_that_cannot_tell_the_processor_s_features_has_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.resolve("auto", torch.device("cpu")) == "fp32"
