import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import close as close

from mim4dd import augment
from mim4dd.augment import AugmentParams
from mim4dd.data import load
from mim4dd.losses.form import LossForm
from mim4dd.objectives import Matched, Objective, Problem, TrajectoryConfig
from mim4dd.seeding import generator as seeded
from mim4dd.synthetic import SyntheticSet, initialise

# Read when the kernels are imported: without a GPU they run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        from triton.language.core import is_builtin
        from triton.runtime import interpreter

        # At every call of a function the interpreter looks through the whole language for what to replace,
        # which takes a quarter of its time: what there is to replace does not change.
        @functools.cache
        def builtins_of(package):
            return [name for name in dir(package) if is_builtin(getattr(package, name, None))]

        def patch_builtins(package, builder, scope):
            for name in builtins_of(package):
                if is_builtin(member := getattr(package, name)):
                    interpreter._patch_attr(package, name, member, builder, scope)

        interpreter._patch_builtin = patch_builtins

GOLDEN = Path(__file__).parent / "golden"
FORMS = [
    LossForm("nce"),
    LossForm("nce", negatives=3.0, symmetric=True),
    LossForm("info_nce"),
    LossForm("info_nce", symmetric=True),
    LossForm("info_nce_any"),
    LossForm("info_nce_any", symmetric=True),
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep what the tests make apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MIM4DD_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def golden():
    """Load a golden file (see tests/golden/README.md) as a dict of tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}

    return load


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished quick run, as a subprocess in an empty folder, with nothing but the defaults."""
    from commands import QUICK, command  # the command line's packages, which not every test needs

    where = tmp_path_factory.mktemp("finished")
    done = command(*QUICK, "--ipc", "2", "--baselines", "random", "kmeans", "base", "full", cwd=where)
    assert done.returncode == 0, done.stderr
    return where / "runs" / "digits-dm-ipc2-0", done


@pytest.fixture
def scored(monkeypatch):
    """Runs that cost nothing: `score` says what each is worth; the settings of those run are returned."""
    from mim4dd.config_json import to_json
    from mim4dd.studies import cells

    ran = []

    def use(score):
        def run(experiment, folder, checkpoint):
            config, accuracy = experiment.config, score(experiment.config)
            ran.append(config)
            others = {name: {"accuracy_mean": accuracy / 2} for name in config.eval.eval_archs}
            outcome = {
                "accuracy_mean": accuracy,
                "num_networks": 1,
                "seconds": {"distill": 3.0, "evaluate": 1.0},
                "cross_architecture": others,
                "config": to_json(config),
            }
            (folder / "result.json").write_text(json.dumps(outcome))
            return outcome

        monkeypatch.setattr(cells, "run", run)
        return ran

    return use


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Random pictures, uint8 [count, *shape]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels_of(*counts: int) -> np.ndarray:
    """Labels with these counts, in a random order."""
    return np.random.default_rng(7).permutation(np.repeat(np.arange(len(counts)), counts))


def picture(size: tuple[int, int], seed: int, grey: bool = False) -> np.ndarray:
    """A picture of random pixels, uint8 [height, width, 3], or [height, width] if grey."""
    return pixels(1, *size, *(() if grey else (3,)), seed=seed)[0]


def write_pictures(folder: Path, count: int, size=(10, 10), seed: int = 0, grey: bool = False) -> None:
    """Write the pictures of seeds `seed` and on as 0.png, 1.png, ..."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(picture(size, seed + i, grey)).save(folder / f"{i}.png")


def derivatives(function, inputs: list[torch.Tensor], twice: int) -> list[torch.Tensor]:
    """The outcome, its gradients by the inputs, and those of a mixture of them: by the first `twice` inputs
    and by the upstream gradient.
    """
    out = function(*inputs)

    def random(tensor: torch.Tensor, name: str) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=seeded(0, name)).to(tensor.dtype)

    upstream = random(out, "upstream").requires_grad_()
    first = torch.autograd.grad(out, inputs, upstream, create_graph=True)
    mixed = torch.stack([(gradient * random(gradient, "mixture")).sum() for gradient in first]).sum()
    return [out, *first, *torch.autograd.grad(mixed, [*inputs[:twice], upstream])]


def labelled_features(
    m: int, n: int, d: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Anchors [m, d], keys [n, d], and a label for each."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, d, generator=g, dtype=dtype),
        torch.randn(n, d, generator=g, dtype=dtype),
        torch.randint(classes, (m,), generator=g),
        torch.randint(classes, (n,), generator=g),
    )


def labelled_leaves(
    m: int, n: int, d: int, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """The same, and the features want gradients."""
    anchors, keys, *labels = labelled_features(m, n, d, classes, seed, dtype)
    return anchors.requires_grad_(), keys.requires_grad_(), *labels


def params_with(batch: int, **fields: torch.Tensor) -> AugmentParams:
    """The identity but for these fields."""
    return dataclasses.replace(AugmentParams.identity(batch), **fields)


def random_params(batch: int, size: tuple[int, int], seed: int = 0) -> AugmentParams:
    """Parameters of all parts at once."""
    return augment.sample(augment.DSA, batch, size, generator=torch.Generator().manual_seed(seed), mode="all")


def digits_problem(ipc: int = 1, factor: int = 1) -> tuple[Problem, SyntheticSet]:
    """A small problem on the built-in digits, and a set to start from."""
    train, _ = load("digits")
    start = initialise(train, ipc, "real", torch.Generator().manual_seed(0), factor=factor)
    problem = Problem(
        real=train,
        labels=start.decoded_labels,
        architecture="convnet",
        width=8,
        real_batch=8,
        augmentation="color_crop",
        layers=(),
        seed=0,
        trajectory=TrajectoryConfig(
            num_experts=2, expert_snapshots=3, expert_batches=2, max_start=2, student_steps=3, student_batch=6
        ),
    )
    return problem, start


def prepared_match(objective: Objective, images: torch.Tensor, targets: torch.Tensor) -> Matched:
    """What the loop asks of an objective in one update."""
    objective.prepare(images.detach(), targets.detach())
    return objective.match(images, targets)
