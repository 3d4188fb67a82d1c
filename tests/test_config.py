import dataclasses
import inspect
import json
import typing
from pathlib import Path

import pytest

from mim4dd.commands import config_check, config_json, presets
from mim4dd.config import Config, DataConfig, DistillConfig, EvalConfig, MimConfig
from mim4dd.errors import InputError
from mim4dd.objectives import TrajectoryConfig
from mim4dd.run import RunConfig
from mim4dd.studies.compare_settings import Comparison
from mim4dd.studies.tune_settings import Tuning


def settings(**parts) -> Config:
    return presets.with_presets(Config(**parts))


def unsettled(value: Config) -> list[str]:
    return [
        f"{part}.{name}"
        for part in ("distill", "mim", "eval")
        for name, setting in vars(getattr(value, part)).items()
        if setting is None
    ]


@pytest.mark.parametrize("preset", ["short", "paper"])
@pytest.mark.parametrize("quick", [False, True])
def test_presets_leave_nothing_open(preset, quick):
    assert unsettled(settings(preset=preset, quick=quick)) == []


def test_given_settings_go_before_the_preset():
    given = settings(distill=DistillConfig(iterations=7), mim=MimConfig(mim_weight=0.0), quick=True)
    assert given.distill.iterations == 7
    assert given.mim.mim_weight == 0.0
    assert given.distill.width == presets.QUICK.width
    fifty = [settings(preset=p, distill=DistillConfig(ipc=50)).distill.image_lr for p in ("short", "paper")]
    assert fifty == [5.0, 1.0], "as published for dm in the longer"
    plain = DistillConfig(augmentation="none")
    assert settings(preset="paper", distill=plain).eval.eval_epochs == 300, "as published"
    assert settings(preset="paper", distill=DistillConfig(method="dc")).eval.eval_epochs == 300


def test_the_weight_falls_with_the_ipc():
    weights = [settings(distill=DistillConfig(ipc=ipc)).mim.mim_weight for ipc in (1, 5, 10, 49, 50, 100)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > weights[-1]


@pytest.mark.parametrize(
    "given", [("mlp,lenet", "vgg11"), ("mlp", "lenet,vgg11", "mlp"), ("mlp,", "lenet,vgg11")]
)
def test_architectures_are_joined_by_commas_or_spaces(given):
    assert EvalConfig(eval_archs=given).eval_archs == ("mlp", "lenet", "vgg11")


def test_json_round_trip(tmp_path):
    original = settings(
        data=DataConfig("cifar10", data_dir=Path("/data")),
        mim=MimConfig(mim_noise_ratio=2.0),
        eval=EvalConfig(baselines=("random", "full"), eval_archs=("mlp", "vgg11")),
    )
    elsewhere = dataclasses.replace(original, out=Path("there"), overwrite=True)
    assert config_json.from_json(config_json.to_json(elsewhere), "a file") == elsewhere
    # Where an earlier run has written is not where the next one is to write.
    for content in (
        config_json.to_json(original),
        {"config": config_json.to_json(elsewhere), "accuracy_mean": 0.5},
    ):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(content))
        assert config_json.read_config(path, Config) == original


def test_partial_files_keep_the_defaults(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"distill": {"ipc": 3}, "seed": 9}')
    assert config_json.read_config(path, Config) == dataclasses.replace(
        Config(), distill=DistillConfig(ipc=3), seed=9
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", r"expected an object of settings, got \[1\]"),
        ('{"distill": 3}', "expected an object of settings, got 3"),
        ('{"seed": 1.5}', "seed is 1.5, expected int"),
        ('{"distill": {"ipc": true}}', "ipc is true, expected int"),
        ('{"distill": {"ipc": null}}', "ipc is null, expected int"),
        ('{"distill": {"width": "64"}}', r'width is "64", expected int \| None'),
        ('{"distill": {"init": "reel"}}', "init is \"reel\", expected .*'real', 'kmeans', 'noise'"),
        ('{"eval": {"baselines": "random"}}', 'baselines is "random", expected tuple'),
        ('{"eval": {"baselines": ["random", "foo"]}}', r'baselines is \["random", "foo"\]'),
        ('{"mim": {"mim_noise_ratio": "foo"}}', 'mim_noise_ratio is "foo", expected .*float'),
        ('{"out": 3}', "out is 3, expected .*Path"),
        ('{"distill": {"iterration": 3}}', "unknown setting .* 'iterration', did you mean iterations"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        config_json.read_config(path, Config)
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        config_json.read_config(tmp_path / "missing.json", Config)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"distill": DistillConfig(method="dmm")}, "unknown method 'dmm', did you mean dm"),
        ({"distill": DistillConfig(network="convnett")}, "unknown network 'convnett', did you mean convnet"),
        ({"distill": DistillConfig(ipc=0)}, "--ipc is 0, expected a number of at least 1"),
        ({"distill": DistillConfig(width=2**31)}, "--width is 2147483648, expected .* below 2147483648"),
        ({"distill": DistillConfig(iterations=-1)}, "--iterations is -1"),
        ({"distill": DistillConfig(image_lr=float("nan"))}, "--image-lr is nan, expected a positive number"),
        ({"distill": DistillConfig(image_lr=1e300)}, "--image-lr is 1e\\+300, expected a positive number"),
        ({"distill": DistillConfig(image_lr=-1)}, "--image-lr is -1, expected a positive number"),
        (
            {"distill": DistillConfig(image_momentum=-0.5)},
            "--image-momentum is -0.5, expected at least 0 and below 1",
        ),
        (
            {"distill": DistillConfig(image_momentum=1)},
            "--image-momentum is 1, expected at least 0 and below 1",
        ),
        ({"distill": DistillConfig(augmentation="color_shear")}, "unknown part 'shear'"),
        ({"mim": MimConfig(mim_weight=float("inf"))}, "--mim-weight is inf, expected a number of at least 0"),
        ({"mim": MimConfig(mim_weight=-2.0)}, "--mim-weight is -2.0, expected a number of at least 0"),
        ({"mim": MimConfig(mim_temperature=0.0)}, "--mim-temperature is 0.0"),
        (
            {"mim": MimConfig(mim_temperature=1e-40)},
            "is 1e-40, expected a positive number within the range of float32",
        ),
        ({"mim": MimConfig(mim_loss="nce", mim_temperature=0.01)}, "0.01 is too low for a calibrated noise"),
        ({"mim": MimConfig(mim_noise_ratio=2.0)}, "only --mim-loss nce has one, not info-nce"),
        ({"mim": MimConfig(mim_layers="first")}, "--mim-layers is 'first', expected all, last or indices"),
        ({"eval": EvalConfig(eval_epochs=0)}, "--eval-epochs is 0, expected a number of at least 1"),
        ({"data": DataConfig(validation=1.0)}, "--validation is 1.0, expected a fraction of at least 0"),
    ],
)
def test_impossible_settings_are_refused(parts, message):
    with pytest.raises(InputError, match=message):
        config_check.check(Config(**parts))


def test_a_noise_ratio_is_positive():
    with pytest.raises(InputError, match="--mim-noise-ratio is 0.0, expected a positive number"):
        config_check.check(Config(mim=MimConfig(mim_loss="nce", mim_noise_ratio=0.0)))


@pytest.mark.parametrize(
    ("part", "kind", "setting", "too_small"),
    [
        ("distill", DistillConfig, "factor", 0),
        ("distill", DistillConfig, "real_batch", 0),
        ("distill", DistillConfig, "width", 0),
        ("eval", EvalConfig, "num_eval", -1),
        ("trajectory", TrajectoryConfig, "num_experts", 0),
        ("trajectory", TrajectoryConfig, "expert_snapshots", 0),
        ("trajectory", TrajectoryConfig, "expert_batches", -1),
        ("trajectory", TrajectoryConfig, "max_start", 0),
        ("trajectory", TrajectoryConfig, "span", 0),
        ("trajectory", TrajectoryConfig, "student_steps", 0),
        ("trajectory", TrajectoryConfig, "student_batch", 0),
        ("trajectory", TrajectoryConfig, "student_lr", 0.0),
        ("trajectory", TrajectoryConfig, "student_lr_rate", 0.0),
        ("mim", MimConfig, "mim_projection_size", 0),
        ("mim", MimConfig, "mim_layer_decay", 0.0),
    ],
)
def test_a_number_that_is_too_small_is_refused(part, kind, setting, too_small):
    option = f"--{setting.replace('_', '-')} is {too_small}, expected"
    with pytest.raises(InputError, match=option):
        config_check.check(Config(**{part: kind(**{setting: too_small})}))


def test_the_defaults_are_what_the_help_says():
    short, paper = settings(), settings(preset="paper")
    sizes = [(c.iterations, c.init, c.real_batch, c.width) for c in (short.distill, paper.distill)]
    assert sizes == [(200, "kmeans", 128, 64), (20_000, "real", 256, 128)]
    assert [(c.num_eval, c.eval_epochs) for c in (short.eval, paper.eval)] == [(5, 300), (20, 1000)]

    def term_and_lr(method, ipc):
        c = settings(distill=DistillConfig(method=method, ipc=ipc), data=DataConfig(dataset="cifar10"))
        return c.mim.mim_weight, c.distill.image_lr

    methods = "dm", "dc", "dsa", "mtt", "ncfm"
    defaults = {"dm": (300, 1), "mtt": (0.1, 100)}
    assert [term_and_lr(m, 1) for m in methods] == [defaults.get(m, (1000, 0.1)) for m in methods]
    assert [term_and_lr(m, 10)[0] for m in methods] == [100, 1000, 1000, 0, 1000]
    assert [term_and_lr(m, 50) for m in ("dm", "dsa", "ncfm")] == [(30, 5), (300, 0.5), (300, 0.5)]
    lower, higher = (
        " and ".join(m for m in methods if term_and_lr(m, 50)[k] == v) for k, v in ((0, 300), (1, 0.5))
    )
    helps = [" ".join(kind.__doc__.split()) for kind in (MimConfig, DistillConfig)]
    assert f"(300 for {lower} from fifty on)" in helps[0]
    assert f"5 for dm and 0.5 for {higher}." in helps[1]


def test_the_defaults_of_options_without_a_preset():
    assert Config().mim == MimConfig(
        None, "info-nce", "synthetic", "class", "all", 1.0, None, "calibrated", "none", 128, False
    )
    assert Config().eval.baselines == ("random",)
    assert Config().distill.image_momentum == 0.5


@pytest.mark.parametrize("dataset", ["digits", "mnist", "kmnist", "svhn", "fashion-mnist"])
def test_characters_are_not_mirrored(dataset):
    parts = settings(data=DataConfig(dataset=dataset)).distill.augmentation.split("_")
    assert ("flip" in parts) == (dataset == "fashion-mnist")
    assert {"color", "crop", "cutout", "scale", "rotate"} <= {*parts}


def test_the_settings_of_the_term_go_with_its_loss():
    def term(loss, dataset="fashion-mnist", ipc=1):
        parts = {"data": DataConfig(dataset=dataset), "distill": DistillConfig(ipc=ipc)}
        mim = settings(mim=MimConfig(mim_loss=loss), **parts).mim
        return mim.mim_weight, mim.mim_temperature

    assert [term("info-nce"), term("info-nce", "digits")] == [(300, 0.03)] * 2
    assert [term("nce"), term("nce", "digits"), term("nce", ipc=10)] == [(100, 0.1), (10, 0.1), (1, 0.1)]


def test_the_published_term_is_left_out_where_it_does_harm():
    def weights(ipc):
        parts = {"data": DataConfig("cifar10"), "mim": MimConfig(mim_loss="nce")}
        methods = "dm", "dc", "dsa", "mtt", "ncfm"
        runs = [settings(distill=DistillConfig(method=m, ipc=ipc), **parts) for m in methods]
        return [run.mim.mim_weight for run in runs]

    assert weights(1) == [100, 0, 100, 0, 0]
    assert weights(2) == [100, 0, 0, 0, 0]


def test_the_published_protocol_counts_updates_by_method():
    """1,000 networks of gradient matching are as many times its outer steps in updates of the images."""

    def iterations(method, ipc, factor=1):
        distill = DistillConfig(method=method, ipc=ipc, factor=factor)
        return settings(preset="paper", distill=distill).distill.iterations

    assert [iterations("dm", ipc) for ipc in (1, 10)] == [20_000, 20_000]
    assert [iterations("dsa", ipc) for ipc in (1, 10, 50)] == [1000, 10_000, 50_000]
    assert iterations("dsa", 10, factor=2) == 40_000, "the networks see 40 images a class"
    assert iterations("mtt", 10) == 5000
    assert iterations("ncfm", 1) == 20_000
    assert iterations("dc", 10) == 10_000


def test_the_experts_are_as_many_and_as_long_as_published():
    def trajectory(**options):
        t = settings(**options).trajectory
        return t.num_experts, t.expert_snapshots, t.expert_batches, t.max_start, t.student_steps

    assert trajectory(preset="paper") == (100, 50, 0, 20, 30), "an epoch between snapshots"
    assert trajectory() == (3, 8, 100, 5, 20)


@pytest.mark.parametrize("settings", [RunConfig, Comparison, Tuning])
def test_the_help_of_an_option_is_one_paragraph(settings):
    """tyro joins the lines of a description, but for those that begin with no letter."""
    kinds = [kind for kind in typing.get_type_hints(settings).values() if dataclasses.is_dataclass(kind)]
    docs = [inspect.getdoc(base) for kind in (settings, *kinds) for base in kind.__mro__ if base.__doc__]
    wrapped = [line.strip() for doc in docs for line in doc.splitlines() if line.startswith(" " * 8)]
    assert len(wrapped) > 20
    assert [line for line in wrapped if not line[0].isalpha()] == []
