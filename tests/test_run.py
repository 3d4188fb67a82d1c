"""The command lines as a user meets them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import BARE, QUICK, files, npz
from PIL import Image, ImageFont

import mim4dd
from mim4dd import evaluate, run
from mim4dd.commands import report
from mim4dd.files import write
from mim4dd.objectives import METHODS
from mim4dd.synthetic import SyntheticSet


def test_run_leaves_four_files_and_a_table(finished):
    folder, done = finished
    assert files(folder) == ["images.png", "report.html", "result.json", "synthetic.safetensors"]
    for text in ("Accuracy on the test set", "random real images", "dm with mutual information", "base "):
        assert text in done.stdout


@pytest.mark.parametrize(("weight", "name"), [(0, "dm"), (2.0, "dm with mutual information")])
def test_the_table_says_whether_the_term_took_part(weight, name):
    score = {"accuracies": [0.5], "accuracy_mean": 0.5, "num_networks": 1}
    ((found, *_),) = report.rows({**score, "method": "dm", "mim_weight": weight, "baselines": {}})
    assert found == name


def test_result_holds_what_is_promised(finished):
    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    assert result["dataset"] == "digits"
    assert result["method"] == "dm"
    assert (result["ipc"], result["seed"], result["iterations"]) == (2, 0, 3)
    assert result["mim_weight"] > 0
    assert result["accuracy_mean"] == pytest.approx(np.mean(result["accuracies"]))
    assert 0 <= result["accuracy_mean"] <= 1
    assert result["num_networks"] == 1
    assert list(result["baselines"]) == ["random", "kmeans", "base", "full"]
    assert all(b["num_networks"] == 1 and 0 < b["accuracy_mean"] < 1 for b in result["baselines"].values())
    assert result["seconds"].keys() == {"distill", "evaluate"}
    assert result["version"] == mim4dd.__version__
    assert result["evaluated_on"] == "test"
    assert [look["iteration"] for look in result["history"]] == [3]
    assert result["device"].startswith("cpu")
    information = result["mutual_information"]
    assert information["cap"] == pytest.approx(np.log(10))
    assert all(-1 < information[when] <= information["cap"] for when in ("before", "after"))


def test_every_field_of_a_result_is_explained(finished):
    folder, _ = finished
    table = (Path(__file__).parents[1] / "docs/runs.md").read_text().partition("## result.json")[2]
    explained = {
        name for row in re.findall(r"^\| (`[^|]*)", table, re.M) for name in re.findall(r"`(\w+)`", row)
    }
    assert explained == json.loads((folder / "result.json").read_text()).keys()


def test_saved_set_is_ready_to_use(finished):
    folder, _ = finished
    synthetic = SyntheticSet.load(folder / "synthetic.safetensors")
    assert synthetic.images.shape == (20, 1, 8, 8)
    assert synthetic.metadata["method"] == "dm"
    assert synthetic.metadata["config"]["distill"]["ipc"] == 2
    image, label = synthetic.dataset()[5]
    assert image.shape == (1, 8, 8)
    assert label == 2


@pytest.mark.parametrize(
    ("method", "term"),
    [
        *((method, ["--mim-weight", weight]) for method in METHODS for weight in ("0", "1")),
        *((method, ["--mim-loss", "nce", "--mim-weight", "1"]) for method in ("dm", "dc")),
    ],
    ids=str,
)
def test_every_method_beats_random_images(tmp_path, method, term):
    sizes = ["--iterations", "30", "--eval-epochs", "60", "--num-eval", "3", "--init", "real"]
    arguments = ["--quick", *sizes, "--method", method, *term, "--out", str(tmp_path / "a")]
    # A smoke run's experts have seen too little to be worth following.
    experts = ["--expert-batches", "60", "--student-steps", "10"]
    assert run.main([*arguments, *experts]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["method"] == method
    assert result["accuracy_mean"] > result["baselines"]["random"]["accuracy_mean"] + 0.03


@pytest.mark.parametrize("method", ["dm", "dsa", "mtt"])  # as good as the others, which are of their kinds
def test_small_images_and_soft_labels_go_with_every_kind_of_method(tmp_path, method, capsys):
    out = tmp_path / "a"
    options = f"--factor 2 --soft-labels --method {method} --mim-weight 1 --baselines random".split()
    assert run.main([*QUICK, "--eval-epochs", "40", *options, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    synthetic = SyntheticSet.load(out / "synthetic.safetensors")
    assert len(synthetic) == 10
    assert synthetic.soft_labels.shape == (40, 10)
    torch.testing.assert_close(synthetic.soft_labels.sum(1), torch.ones(40))
    # Those of the start are of real images; a teacher that sees the end sees three steps of noise.
    least = 0.7 if METHODS[method].learns_targets else 0.3
    assert synthetic.soft_labels.argmax(1).eq(synthetic.decoded_labels).float().mean() > least
    assert 1 > synthetic.soft_labels.max() > 0.2
    image, target = synthetic.dataset()[5]
    assert (image.shape, target.shape) == ((1, 8, 8), (10,))
    assert evaluate.main([str(out / "synthetic.safetensors"), "--num-eval", "1"]) == 0
    assert f"{100 * result['accuracy_mean']:.1f} %" in capsys.readouterr().out.splitlines()[-2]


def test_networks_for_the_term_are_trained_first(tmp_path, capsys):
    arguments = [*QUICK, "--num-eval", "0", "--mim-networks", "real", "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.index("train networks for the term 550/550") < printed.index("distil 3/3")


def test_pairs_by_cluster(tmp_path, capsys):
    """The term moves the images, towards more information than classes could have, and says so."""
    out = tmp_path / "a"
    arguments = [*QUICK, "--ipc", "5", "--init", "real", "--mim-pairs", "cluster", "--mim-weight", "10"]
    assert run.main([*arguments, "--iterations", "40", "--baselines", "base", "--out", str(out)]) == 0
    information = json.loads((out / "result.json").read_text())["mutual_information"]
    assert information["cap"] == pytest.approx(np.log(49)), "one cluster has no held-out image"
    assert information["before"] + 0.1 < information["after"] <= information["cap"]
    line = f"{information['before']:.2f} nats before, {information['after']:.2f} after, of at most 3.89"
    assert line in capsys.readouterr().out
    assert line in (out / "report.html").read_text()


def test_same_command_same_images(finished, tmp_path):
    folder, _ = finished
    assert run.main([*QUICK, "--ipc", "2", "--num-eval", "0", "--out", str(tmp_path / "again")]) == 0
    first, second = (
        SyntheticSet.load(where / "synthetic.safetensors") for where in (folder, tmp_path / "again")
    )
    assert torch.equal(first.images, second.images)


def test_settings_of_a_result_repeat_it(finished, tmp_path, capsys):
    folder, _ = finished
    arguments = ["--config", str(folder / "result.json"), "--out", str(tmp_path / "a"), "--seed", "1"]
    assert run.main([*arguments, "--baselines", "random"]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (result["ipc"], result["seed"]) == (2, 1)
    assert result["config"]["distill"]["iterations"] == 3


def test_other_architectures_are_scored_on_the_same_images(tmp_path, capsys):
    out = tmp_path / "a"
    arguments = [*BARE, "--num-eval", "2", "--eval-archs", "convnet,mlp", "--out", str(out)]
    assert run.main(arguments) == 0
    result = json.loads((out / "result.json").read_text())
    scores = result["cross_architecture"]
    assert list(scores) == ["convnet", "mlp"]
    assert scores["convnet"]["accuracies"] == result["accuracies"]
    assert scores["mlp"]["accuracies"] != result["accuracies"]
    assert scores["mlp"]["num_networks"] == 2
    assert scores["mlp"]["accuracy_mean"] == pytest.approx(np.mean(scores["mlp"]["accuracies"]))
    printed = capsys.readouterr().out
    assert "other networks trained on them" in printed
    shown = f"{100 * scores['mlp']['accuracy_mean']:.1f} ±"
    assert shown in printed
    assert f"<td>mlp</td><td>{shown}" in (out / "report.html").read_text()
    saved = [str(out / "synthetic.safetensors"), "--num-eval", "2", "--eval-archs", "mlp"]
    assert evaluate.main(saved) == 0
    assert shown in capsys.readouterr().out, "a saved set is scored in the same way"


def test_without_evaluation_and_without_the_term(tmp_path, capsys):
    out = tmp_path / "a"
    assert run.main([*BARE, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy_mean"] is None
    assert result["baselines"] == {}
    assert list(result["history"][0]) == ["iteration", "base"]
    assert "mim" not in capsys.readouterr().out.replace("mim4dd", "")


def test_validation_split_is_reported_as_such(tmp_path, capsys):
    out = tmp_path / "a"
    assert run.main([*QUICK, "--mim-weight", "0", "--validation", "0.2", "--out", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["evaluated_on"] == "validation"
    assert "validation set of 287 images" in capsys.readouterr().out


def test_own_data_in_colour(tmp_path, capsys):
    path = npz(tmp_path / "mine.npz")
    assert run.main([*QUICK, "--dataset", path, "--ipc", "2", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["dataset"] == "mine"
    synthetic = SyntheticSet.load(tmp_path / "out" / "synthetic.safetensors")
    assert synthetic.images.shape == (8, 3, 12, 12)
    assert evaluate.main([str(tmp_path / "out" / "synthetic.safetensors"), "--num-eval", "1"]) == 0


COLOURS = torch.linspace(0.1, 0.9, 12 * 3).view(12, 3)


def picture(*names):
    """That of three classes of four images, each of which is one colour."""
    synthetic = SyntheticSet(
        images=COLOURS[:, :, None, None].expand(-1, -1, 8, 8),
        labels=torch.arange(3).repeat_interleave(4),
        class_names=names,
        mean=torch.zeros(3),
        std=torch.ones(3),
    )
    return report.picture(synthetic)


def test_picture_shows_every_image_in_its_colours():
    image = picture("first", "a name far too long for the narrow strip it has", "third")
    shown = {colour for _, colour in image.getcolors(100_000)}
    for colour in COLOURS:
        assert tuple((colour * 255).round().int().tolist()) in shown


def test_picture_shows_every_image_in_the_strip_of_its_class():
    """Strips of four, two of them side by side, each below the line of its name."""
    shown = np.asarray(picture("first", "second", "third"))
    colours = (COLOURS * 255).round().byte().numpy()
    places = [tuple(np.argwhere((shown == colour).all(2)).min(0)) for colour in colours]
    assert places == [(22 + c // 2 * 90, 4 + c % 2 * 276 + k * 68) for c in range(3) for k in range(4)]


def test_names_under_large_images_can_be_read():
    """On a page that shows a wide picture at a third of its size."""
    ten = SyntheticSet(torch.zeros(10, 1, 250, 250), torch.zeros(10).long(), ("Ab",), *torch.ones(2, 1))
    image = np.asarray(report.picture(ten))
    assert image.shape == (54 + 250 + 3 * report.GAP, 10 * 254 + 2 * report.GAP, 3)
    letters = np.argwhere((image[:54] < 128).all(2))
    assert np.ptp(letters[:, 0]) > 20


def test_a_single_look_at_the_loss_is_seen():
    looks = [{"iteration": 10 * k, "base": 1.0 / k} for k in (1, 2)]
    dot = "M 0 1.5"  # where the outline of a marker begins
    assert dot in report.loss_curve(looks[:1])
    assert dot not in report.loss_curve(looks)


@pytest.mark.parametrize(("most", "classes", "ipc"), [(11, 3, 3), (4, 3, 1), (2, 2, 1), (0, 1, 1)])
def test_of_very_many_images_the_first_are_shown(monkeypatch, most, classes, ipc):
    whole = picture("first", "second", "third")
    monkeypatch.setattr(report, "PIXELS", most * report.SIDE**2)
    image = picture("first", "second", "third")
    assert image.width * image.height < whole.width * whole.height
    shown = {colour for _, colour in image.getcolors(100_000)}
    colours = [tuple(row) for row in (COLOURS * 255).round().int().tolist()]
    assert [k for k, colour in enumerate(colours) if colour in shown] == [
        4 * c + k for c in range(classes) for k in range(ipc)
    ]
    last = np.asarray(image)[-report.TITLE :]
    assert (last < 128).any(), "a line says so"


def test_class_names_may_have_letters_of_other_languages():
    font = ImageFont.truetype(report.FONT, 12)
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in "äéñčŁαЖ")


def test_report_is_one_self_contained_page(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://creativecommons.org", "")
    assert Image.open(folder / "images.png").size[0] > 100


def test_names_are_no_markup(finished, tmp_path):
    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    result["dataset"] = result["config"]["data"]["dataset"] = "<b>&"
    report.write(tmp_path, SyntheticSet.load(folder / "synthetic.safetensors"), result)
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert "<h1>&lt;b&gt;&amp;: 2 synthetic images per class</h1>" in page


@pytest.mark.parametrize("failing", ["images.png", "report.html"])
def test_a_result_is_there_only_if_all_the_rest_is(finished, tmp_path, monkeypatch, failing):
    folder, _ = finished

    def full(path, content):
        if path.name == failing:
            raise OSError("disk full")
        return write(path, content)

    monkeypatch.setattr("mim4dd.files.write", full)
    result = json.loads((folder / "result.json").read_text())
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path, SyntheticSet.load(folder / "synthetic.safetensors"), result)
    assert "result.json" not in files(tmp_path)


def test_light_imports():
    """The losses, augmentation and objectives need torch, numpy and safetensors only."""
    code = (
        "import sys, mim4dd\n"
        "heavy = {'tyro', 'rich', 'sklearn', 'scipy', 'PIL', 'pyarrow', 'matplotlib', 'jinja2'}\n"
        "heavy |= {'triton', 'torch._dynamo'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
