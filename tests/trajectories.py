"""A small problem of trajectory matching, with experts of its own."""

import dataclasses

import pytest
import torch
from conftest import digits_problem

from mim4dd.objectives.trajectory import open_experts, recipe


@pytest.fixture
def problem(tmp_path):
    problem, _ = digits_problem(ipc=2)
    return with_options(problem, experts=tmp_path / "experts")


def with_options(problem, **options):
    return dataclasses.replace(problem, trajectory=dataclasses.replace(problem.trajectory, **options))


def weights(problem, expert, snapshot):
    return open_experts(recipe(problem)).weights(expert, snapshot, torch.device("cpu"))
