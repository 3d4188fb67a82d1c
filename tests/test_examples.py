"""The code in docs/objectives.md, docs/data.md and examples/ runs and does what the text says."""

import re
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from mim4dd import SyntheticSet
from mim4dd.data import load
from mim4dd.evaluation import Protocol, evaluate
from mim4dd.synthetic import initialise

ROOT = Path(__file__).parents[1]
MARK = "  # mim4dd"


def test_own_objective(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/objectives.md").read_text()
    objective, use, students = re.findall(r"```python\n(.*?)```", page, re.S)
    body = objective[objective.index("class ") :].strip()
    assert len(body.splitlines()) <= 20
    names = {}
    code = objective + use + students
    assert "mim4dd." not in re.sub(r"from mim4dd\.\w+ import", "", code), "imports are explicit"
    exec(objective, names)
    exec(use, names)
    saved = SyntheticSet.load("digits.safetensors")
    assert torch.equal(saved.images, names["distilled"].images)

    def accuracy(synthetic):
        protocol = Protocol(epochs=60, augmentation="none", width=16)
        pair = synthetic.images, synthetic.labels
        return evaluate(lambda _: pair, names["test"], protocol, num_networks=2, seed=0).mean

    assert accuracy(saved) > accuracy(names["start"]) + 0.1
    exec(students, names)
    assert accuracy(names["distilled"]) > accuracy(names["start"]) + 0.1


def test_a_network_of_ones_own_on_a_distilled_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/digits-dm-ipc1-0")
    folder.mkdir(parents=True)
    train, _ = load("digits")
    start = initialise(train, 1, "kmeans", torch.Generator().manual_seed(0))
    start.save(folder / "synthetic.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = {}
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S):
            exec(code, names)
    assert names["own"].batch(torch.arange(100)).mean().abs() < 0.01
    assert float(re.findall(r"tensor\((.*)\)", capsys.readouterr().out)[0]) > 0.6


def test_five_lines_in_a_textbook_loop():
    source = (ROOT / "examples/textbook_dc.py").read_text()
    lines = source.splitlines()
    assert sum(line.endswith(MARK) for line in lines) == 5
    plain = "\n".join(line for line in lines if not line.endswith(MARK))
    assert "mim4dd." not in plain
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    results = []
    with torch.random.fork_rng():
        for code in (plain, source):
            names = {"__name__": "example"}
            exec(code, names)
            torch.manual_seed(0)
            start = names["condense"](images[:1400], labels[:1400], 0)
            condensed = names["condense"](images[:1400], labels[:1400], 40)
            torch.manual_seed(0)
            shares = [names["accuracy"](x, images[1400:], labels[1400:]) for x in (start, condensed)]
            assert shares[1] > shares[0] + 0.05
            results.append(condensed)
    assert not torch.allclose(*results, atol=1e-3), "the term moves the images"
