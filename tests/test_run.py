"""The command lines as a user meets them."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import mim4dd
from mim4dd import evaluate, report, run
from mim4dd.objectives import METHODS
from mim4dd.synthetic import SyntheticSet

QUICK = ["--quick", "--iterations", "3", "--eval-epochs", "2"]


def command(*arguments, module="run", **options):
    return subprocess.run(
        [sys.executable, "-m", f"mim4dd.{module}", *arguments], capture_output=True, text=True, **options
    )


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished quick run, as a subprocess in an empty folder, with nothing but the defaults."""
    where = tmp_path_factory.mktemp("finished")
    done = command(*QUICK, "--ipc", "2", "--baselines", "random", "kmeans", "base", "full", cwd=where)
    assert done.returncode == 0, done.stderr
    return where / "runs" / "digits-dm-ipc2-0", done


def test_run_leaves_four_files_and_a_table(finished):
    folder, done = finished
    assert files(folder) == ["images.png", "report.html", "result.json", "synthetic.safetensors"]
    for text in ("Accuracy on the test set", "random real images", "dm with mutual information", "base "):
        assert text in done.stdout


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
    "term",
    [["--mim-weight", "0"], ["--mim-weight", "1"], ["--mim-loss", "nce", "--mim-weight", "1"]],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_beats_random_images(tmp_path, method, term):
    sizes = ["--iterations", "40", "--eval-epochs", "60", "--num-eval", "3", "--init", "real"]
    arguments = ["--quick", *sizes, "--method", method, *term, "--out", str(tmp_path / "a")]
    # A smoke run's experts have seen too little to be worth following.
    experts = ["--expert-batches", "60", "--student-steps", "10"]
    assert run.main([*arguments, *experts]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["method"] == method
    assert result["accuracy_mean"] > result["baselines"]["random"]["accuracy_mean"] + 0.03


@pytest.mark.parametrize("method", METHODS)
def test_small_images_and_soft_labels_go_with_every_method(tmp_path, method, capsys):
    out = tmp_path / "a"
    options = [
        "--factor",
        "2",
        "--soft-labels",
        "--method",
        method,
        "--mim-weight",
        "1",
        "--baselines",
        "random",
    ]
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
    assert f"{100 * result['accuracy_mean']:.1f} ±" in capsys.readouterr().out.splitlines()[-2]


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
    assert information["cap"] == pytest.approx(np.log(50))
    assert information["before"] + 0.1 < information["after"] <= information["cap"]
    line = f"{information['before']:.2f} nats before, {information['after']:.2f} after, of at most 3.91"
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
    assert run.main([*QUICK, "--num-eval", "2", "--eval-archs", "convnet,mlp", "--out", str(out)]) == 0
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
    saved = [str(out / "synthetic.safetensors"), "--num-eval", "2", "--architectures", "mlp"]
    assert evaluate.main(saved) == 0
    assert shown in capsys.readouterr().out, "a saved set is scored in the same way"


def test_without_evaluation_and_without_the_term(tmp_path, capsys):
    out = tmp_path / "a"
    assert run.main([*QUICK, "--num-eval", "0", "--mim-weight", "0", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy_mean"] is None
    assert result["baselines"] == {}
    assert list(result["history"][0]) == ["iteration", "base"]
    assert "mim" not in capsys.readouterr().out.replace("mim4dd", "")


def test_validation_split_is_reported_as_such(tmp_path, capsys):
    out = tmp_path / "a"
    assert run.main([*QUICK, "--validation", "0.2", "--out", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["evaluated_on"] == "validation"
    assert "validation set of 287 images" in capsys.readouterr().out


def test_results_are_never_overwritten_silently(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = [*QUICK, "--num-eval", "0"]
    for _ in range(2):
        assert run.main(quick) == 0
    assert files(tmp_path / "runs") == ["digits-dm-ipc1-0", "digits-dm-ipc1-0-2"]
    named = [*quick, "--out", "runs/digits-dm-ipc1-0"]
    before = (tmp_path / "runs/digits-dm-ipc1-0/result.json").read_bytes()
    assert run.main([*named, "--seed", "5"]) == 2
    assert "holds something already; give another folder, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "runs/digits-dm-ipc1-0/result.json").read_bytes() == before
    assert run.main([*named, "--seed", "5", "--overwrite"]) == 0
    assert (tmp_path / "runs/digits-dm-ipc1-0/result.json").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digts"], "unknown data set 'digts', did you mean digits"),
        (["--method", "dn"], "unknown method 'dn', did you mean dm"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "not found in nowhere"),
        (["--dataset", "./nothing.npz"], "no such file or folder"),
        (["--ipc", "0"], "--ipc is 0, expected at least 1"),
        (["--factor", "3"], "--factor 3 does not divide images of 8x8"),
        (["--ipc", "1000"], "fewer than the 1000 asked for"),
        (["--ipc", "1000", "--mim-pairs", "cluster"], "fewer than the 1000 asked for"),
        (["--device", "cuda"], "--device cuda is not to be had here"),
        (["--device", "toaster"], "--device toaster is not to be had here"),
        (["--device", "meta"], "--device meta is not to be had here"),
        (["--mim-layers", "0,7"], "there is no layer 7, the network has 2"),
        (
            ["--eval-archs", "mlp,resnet"],
            "unknown architecture in --eval-archs: 'resnet', did you mean resnet18",
        ),
        (["--config", "missing.json"], "--config missing.json cannot be read"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    assert run.main([*QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2
    assert files(tmp_path) == []


def npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 255, (40, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 255, (8, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    np.savez(path, **{**arrays, **changes})
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.linspace(0, 3, 40)}, "labels not integers"),
        ({"y_train": np.arange(40) % 4 - 1}, "label -1"),
        ({"y_test": np.arange(8)}, "label 7, but the training labels end at 3"),
        ({"x_train": np.full((40, 12, 12, 3), np.nan, np.float32)}, "NaN"),
        ({"x_train": np.zeros((40, 12, 16, 3), np.uint8)}, "square"),
        ({"x_train": np.zeros((40, 6, 6, 3), np.uint8)}, "at least 8x8"),
    ],
)
def test_bad_data_exit_with_2(tmp_path, capsys, changes, message):
    path = npz(tmp_path / "data.npz", **changes)
    assert run.main([*QUICK, "--dataset", path, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_own_data_in_colour(tmp_path, capsys):
    path = npz(tmp_path / "mine.npz")
    assert run.main([*QUICK, "--dataset", path, "--ipc", "2", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["dataset"] == "mine"
    synthetic = SyntheticSet.load(tmp_path / "out" / "synthetic.safetensors")
    assert synthetic.images.shape == (8, 3, 12, 12)
    assert evaluate.main([str(tmp_path / "out" / "synthetic.safetensors"), "--num-eval", "1"]) == 0


def test_unwritable_out(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run.main([*QUICK, "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run.main([*QUICK, "--out", str(tmp_path / "file"), "--overwrite"]) == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_option_exits_with_2_without_traceback():
    done = command("--ipcs", "3")
    assert done.returncode == 2
    assert "--ipcs" in done.stderr
    assert "Traceback" not in done.stderr


def test_divergence_exits_with_1_and_keeps_the_last_good_set(tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main([*QUICK, "--iterations", "20", "--image-lr", "3e38", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "became" in error or "not finite" in error
    assert "the last good set, of iteration" in error
    assert SyntheticSet.load(out / "synthetic.safetensors").images.isfinite().all()


def test_interruption_keeps_the_last_good_set(tmp_path):
    arguments = ["--quick", "--mim-weight", "0", "--iterations", "100000", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mim4dd.run", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: what runs in the background may ignore the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # The last line before the first iteration.
    assert any("real images at a time" in line for line in iter(process.stdout.readline, ""))
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "the last good set, of iteration" in error
    assert len(SyntheticSet.load(tmp_path / "out" / "synthetic.safetensors")) == 10


def test_output_that_nobody_reads_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "mim4dd.run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # what `| head` does when it has seen enough
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_evaluate_scores_a_saved_set(finished, capsys):
    folder, _ = finished
    path = str(folder / "synthetic.safetensors")
    assert evaluate.main([path, "--num-eval", "1", "--architectures", "convnet", "mlp"]) == 0
    out = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert f"convnet │ {100 * result['accuracies'][0]:.1f}" in out, "the same seed gives the same accuracy"
    assert "mlp" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-eval", "0"], "--num-eval is 0, expected at least 1"),
        (["--architectures", "mpl"], "unknown architecture 'mpl', did you mean mlp"),
        (["--device", "toaster"], "--device toaster is not to be had here"),
    ],
)
def test_evaluate_refuses_bad_input(finished, capsys, arguments, message):
    folder, _ = finished
    assert evaluate.main([str(folder / "synthetic.safetensors"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_files_and_data_that_do_not_fit(finished, tmp_path, capsys):
    folder, _ = finished
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    assert evaluate.main([str(tmp_path / "bad.safetensors")]) == 2
    assert "not a readable synthetic set" in capsys.readouterr().err
    other = npz(tmp_path / "other.npz")
    assert evaluate.main([str(folder / "synthetic.safetensors"), "--dataset", other]) == 2
    assert "name its data with --dataset" in capsys.readouterr().err


def test_picture_shows_every_image_in_its_colours():
    """Each image is one colour, which must be found at its place, named classes wrapping after ten images."""
    colours = torch.linspace(0.1, 0.9, 12 * 3).view(12, 3)
    names = ("first", "a name far too long for the narrow strip it has", "third")
    synthetic = SyntheticSet(
        images=colours[:, :, None, None].expand(-1, -1, 8, 8),
        labels=torch.arange(3).repeat_interleave(4),
        class_names=names,
        mean=torch.zeros(3),
        std=torch.ones(3),
    )
    image = report.picture(synthetic)
    shown = {colour for _, colour in image.getcolors(100_000)}
    for colour in colours:
        assert tuple((colour * 255).round().int().tolist()) in shown


def test_report_is_one_self_contained_page(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://creativecommons.org", "")
    assert Image.open(folder / "images.png").size[0] > 100


def test_light_imports():
    """The losses, augmentation and objectives need torch, numpy and safetensors only."""
    code = (
        "import sys, mim4dd\n"
        "heavy = {'tyro', 'rich', 'sklearn', 'scipy', 'PIL', 'pyarrow', 'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
