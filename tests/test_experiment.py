"""From settings to what is run: each arrives where it belongs."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from commands import prepare
from conftest import close

from mim4dd import experiment, networks
from mim4dd.commands import runner
from mim4dd.data import load
from mim4dd.data.clusters import cluster_labels, image_for_each, kmeans_centres
from mim4dd.experiment import Experiment
from mim4dd.networks import memory
from mim4dd.objectives import METHODS, TrainedOnReal, TrainedOnSynthetic, mutual_information_estimate
from mim4dd.objectives.footprint import of_term
from mim4dd.seeding import generator
from mim4dd.synthetic import encode, initialise


@pytest.fixture
def brief_students(monkeypatch):
    monkeypatch.setattr("mim4dd.objectives.term_networks.STUDENT_EPOCHS", (3, 3))


def test_the_problem_is_that_of_the_settings(monkeypatch):
    asked, budgets = [], []

    def recorded(name, folder, size):
        asked.append((name, folder, size))
        return load("digits", None, size)

    monkeypatch.setattr(memory, "budget", lambda *arguments: budgets.append(arguments) or 10**7)
    monkeypatch.setattr(experiment.precision, "resolve", lambda *_: "bf16")
    options = "--image-size 12 --validation 0.25 --ipc 2 --factor 2 --network mlp --real-batch 9"
    options += " --augmentation crop --mim-layers 0 --student-steps 7 --memory-budget 1.5"
    prepared = prepare(options + " --data-dir here", recorded)
    assert asked == [("digits", Path("here"), 12)]
    assert budgets == [(1.5, torch.device("cpu"))]
    problem = prepared.problem
    train, held_out = load("digits", None, 12)[0].split(0.25, generator(3, "validation"))
    assert torch.equal(problem.real.images, train.images)
    assert torch.equal(prepared.test.images, held_out.images)
    assert torch.equal(problem.labels, torch.arange(10).repeat_interleave(8))
    assert (problem.architecture, problem.width, problem.real_batch) == ("mlp", 8, 9)
    assert (problem.augmentation, problem.layers, problem.seed) == ("crop", [0], 3)
    assert (problem.precision, problem.memory, problem.partners) == ("bf16", 10**7, None)
    assert problem.trajectory.student_steps == 7


def test_the_term_is_that_of_the_settings():
    options = "--mim-loss nce --mim-weight 7 --mim-layers 0 --mim-layer-decay 0.5 --mim-temperature 0.2"
    options += " --mim-noise-ratio 2 --mim-projection trained --mim-projection-size 5 --mim-symmetric"
    term = prepare(options).mutual_information()
    assert (term.loss, term.weight, term.layers, term.layer_decay) == ("nce", 7, [0], 0.5)
    assert (term.temperature, term.noise_ratio, term.symmetric) == (0.2, 2, True)
    (projection,) = term.parameters()
    assert projection.requires_grad
    drawn = torch.randn(8 * 4 * 4, 5, generator=generator(3, "projection"))
    torch.testing.assert_close(projection.detach(), drawn / 5**0.5)
    plain = prepare().mutual_information()
    assert (plain.loss, plain.noise_ratio, plain.symmetric) == ("info_nce", "calibrated", False)
    assert not [*plain.parameters()]


@pytest.mark.parametrize("init", ["real", "kmeans", "noise"])
def test_the_start_is_that_of_the_settings(init):
    start = prepare(f"--ipc 2 --init {init}").start
    expected = initialise(load("digits")[0], 2, init, generator(3, "init"))
    assert torch.equal(start.images, expected.images)
    assert start.factor == 1


def test_the_loop_is_given_the_settings(monkeypatch):
    calls = []

    def distill(objective, start, **options):
        calls.append((objective, start, options))
        return start

    monkeypatch.setattr(experiment, "distill", distill)
    prepared = prepare("--iterations 4 --image-lr 0.3 --image-momentum 0.2 --mim-weight 2")
    state = {"images": torch.zeros(1)}
    assert prepared.distill(print, state=state) is prepared.start
    prepared.distill(print, with_mim=False)
    (_, start, options), (_, _, without) = calls
    assert start is prepared.start
    assert options.pop("mutual_information").weight == 2
    assert without.pop("mutual_information") is None
    assert (options.pop("state"), without.pop("state")) == (state, None)
    assert options == without == {"iterations": 4, "lr": 0.3, "momentum": 0.2, "on_progress": print}


def test_the_term_looks_through_the_networks_of_the_settings():
    def networks(name):
        objective = prepare(f"--mim-networks {name}")._objective(with_term=True)
        return type(getattr(objective, "networks", None))

    assert networks("synthetic") is TrainedOnSynthetic
    assert networks("real") is TrainedOnReal
    assert networks("base") is type(None)


@pytest.mark.parametrize("init", ["real", "kmeans"])
def test_pairs_by_cluster_go_with_the_images_of_the_start(init):
    """Image j of a class starts from four real ones, each of which goes with a cluster of its own."""
    prepared = prepare(f"--mim-pairs cluster --ipc 2 --factor 2 --init {init}")
    train, random = load("digits")[0], generator(3, "init")
    centres = kmeans_centres(train, 8, random)
    assert torch.equal(prepared.centres, centres)
    assert torch.equal(prepared.problem.partners, cluster_labels(train, centres))
    candidates = [(train.labels == c).nonzero().squeeze(1) for c in range(10)]
    if init == "real":
        candidates = train.sample(8, random)
    index = image_for_each(centres, train, candidates)
    assert torch.equal(prepared.start.images, encode(train.batch(index.flatten()), 2))


def test_the_term_of_a_run_pairs_by_cluster(brief_students):
    """Through networks of its own, the default: from the same start the images go elsewhere."""
    runs = [prepare(f"--mim-pairs {pairs} --ipc 2 --iterations 1") for pairs in ("cluster", "class")]
    assert torch.equal(runs[0].start.images, runs[1].start.images)
    cluster, class_ = (one.distill(lambda _: None).images for one in runs)
    assert cluster.isfinite().all()
    assert not torch.allclose(cluster, class_)


def test_whitening_is_measured_on_the_training_images():
    train, test = load("digits")
    prepared = prepare("--zca")
    close(prepared.train.whitening.mean, train.images.flatten(1).float().mean(0) / scale(train))
    for ours, plain in ((prepared.train, train), (prepared.test, test)):
        close(ours.images, prepared.train.whitening.apply(plain.images), 1e-6)


def test_the_data_of_a_run_are_those_that_were_loaded():
    """Not what a split or whitening made of them: others compare it with what they load."""
    assert prepare("--validation 0.2 --zca").data == load("digits")[0].fingerprint


def scale(images):
    return 255 if images.images.dtype == torch.uint8 else 1


def test_footprint():
    """That of the method; with networks of its own the term comes on top, and its layers are seen there."""
    dm, ncfm = METHODS["dm"].footprint, METHODS["ncfm"].footprint
    assert prepare("--mim-weight 0").footprint == dm(prepare("--mim-weight 0").problem)
    base = prepare("--mim-networks base --mim-layers 0")
    assert base.problem.layers
    assert base.footprint == dm(base.problem)
    own = prepare("--method ncfm --mim-weight 1 --mim-layers 0")
    alone = dataclasses.replace(own.problem, layers=())
    assert own.footprint == ncfm(alone) + of_term(own.problem)
    assert of_term(own.problem) > of_term(alone)


def test_a_run_begins_with_what_it_takes(capsys, monkeypatch):
    prepared = prepare("--mim-weight 0 --precision fp32")
    takes = f"fp32; an update takes about {runner.decimal(prepared.footprint)}"
    runner.introduce(prepared, None)
    monkeypatch.setattr(Experiment, "device", torch.device("cuda"))
    monkeypatch.setattr(runner, "device_name", lambda device: "a GPU")
    runner.introduce(prepared, None)
    on_cpu, on_gpu = (line for line in capsys.readouterr().out.splitlines() if "takes about" in line)
    assert on_cpu == f"{takes}; without the term (weight 0)"
    assert on_gpu == f"{takes} and cuDNN's workspace; without the term (weight 0)"


def test_the_teacher_draws_by_the_seed(monkeypatch):
    taught = []
    monkeypatch.setattr(experiment, "teach", lambda *arguments: taught.append(arguments))
    prepared = prepare("--network mlp")
    network = prepared.teacher
    ((student, real, protocol, random),) = taught
    assert student is network
    assert real is prepared.train
    assert protocol.architecture == "mlp"
    assert random.initial_seed() == generator(3, "teacher").initial_seed()


def test_a_run_that_goes_on_trains_no_teacher_again(monkeypatch, brief_students):
    monkeypatch.setattr("mim4dd.teacher.STEPS", 20)
    run = prepare("--method dsa --soft-labels --width 8 --network mlp --iterations 20")
    states, seen = {}, lambda progress: states.update({progress.iteration: progress.state})
    whole = run.distill(seen)
    monkeypatch.setattr(experiment.Experiment, "teacher", property(lambda self: pytest.fail("trained")))
    resumed = run.distill(seen, state=states[10])
    assert torch.equal(resumed.soft_labels, whole.soft_labels)
    assert torch.equal(resumed.images, whole.images)


def test_only_the_term_has_maps_kept(monkeypatch, brief_students):
    made = []
    dm = METHODS["dm"]
    monkeypatch.setitem(
        METHODS, "dm", dataclasses.replace(dm, objective=lambda p: made.append(p.layers) or dm.objective(p))
    )
    prepared = prepare("--iterations 1 --mim-networks base --mim-weight 1")
    prepared.distill(lambda _: None)
    prepared.distill(lambda _: None, with_mim=False)
    assert made == [[0, 1], ()]


@pytest.mark.parametrize("network", ["convnet", "convnet-bn"])
def test_the_information_is_seen_by_a_network_that_no_loss_has_seen(network):
    prepared = prepare(f"--network {network} --ipc 2")
    problem, start, test = prepared.problem, prepared.start, prepared.test
    unseen, random = problem.network(), generator(3, "information/real")
    networks.initialise(unseen, generator(3, "information/network"))
    problem.set_batch_norm_statistics(unseen, random)
    index = torch.randperm(len(test), generator=random)
    after = dataclasses.replace(start, images=start.images.flip(0))
    sets = test.batch(index), start.images, after.images
    real, *synthetic = (unseen.features(images)[-1].detach() for images in sets)
    labels = problem.labels, test.labels[index]
    expected = [mutual_information_estimate(maps, real, *labels, temperature=0.1) for maps in synthetic]
    found = prepared.information(after)
    assert [found["before"], found["after"]] == pytest.approx(expected, abs=1e-4)


def test_of_held_out_images_of_one_class_there_is_no_information():
    prepared = prepare("--iterations 1")
    assert prepared.information(prepared.start)["cap"] == pytest.approx(math.log(10))
    of_one = prepared.test.labels == 3
    images, labels = prepared.test.images[of_one], prepared.test.labels[of_one]
    test = dataclasses.replace(prepared.test, images=images, labels=labels)
    one = dataclasses.replace(prepared, test=test).information(prepared.start)
    assert one == {"before": None, "after": None, "cap": 0.0}
