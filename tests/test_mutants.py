"""The list of mutants fits the code: each changes one place, and still is Python."""

import ast

import pytest
from mutants import MUTANTS, mutated


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_can_be_made(name):
    ast.parse(mutated(name)[1])
