import itertools
import random

import pytest

from tabom.lab.tasks import TASKS, Problem, Sudoku, is_held_out, make_task, solved_grids


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_right_distinct_of_one_length_and_reproducible(name):
    task = make_task(name)
    problems = task.problems(200, "train", seed=1)
    assert problems == task.problems(200, "train", seed=1) != task.problems(200, "train", seed=2)
    assert len({p.prompt for p in problems}) == 200
    assert all(len(p.answer) == task.response_length and task.is_correct(p, p.answer) for p in problems)
    assert not any(task.is_correct(p, p.answer[:-1] + "x") for p in problems)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_held_out_prompts_never_overlap(name):
    task = make_task(name)
    train = {p.prompt for seed in range(3) for p in task.problems(300, "train", seed)}
    test = {p.prompt for seed in range(3) for p in task.problems(300, "test", seed)}
    assert not train & test
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


def test_answers_by_arithmetic():
    for name, sign in (("addition", 1), ("subtraction", -1)):
        for prompt, answer in make_task(name).problems(100, "train", 0):
            assert int(answer) == int(prompt[:3]) + sign * int(prompt[4:7])


def test_there_are_288_sudoku_grids_and_a_checker_by_brute_force_agrees():
    assert len(set(solved_grids())) == len(solved_grids()) == 288
    puzzle = "12..34.........."
    right = [
        grid for grid in solved_grids() if all(given in (".", cell) for given, cell in zip(puzzle, grid, strict=True))
    ]
    problem = Problem(f"sudoku {puzzle}=", right[0])
    assert len(right) > 1, "more than one completion, and each must count"
    assert all(Sudoku().is_correct(problem, grid) for grid in right)
    others = itertools.islice((g for g in solved_grids() if g not in right), 50)
    assert not any(Sudoku().is_correct(problem, grid) for grid in others)
    assert not Sudoku().is_correct(problem, "1" * 16)


@pytest.mark.parametrize("givens", [0, 6, 12, 16])
def test_sudoku_shows_the_chosen_number_of_givens(givens):
    problem = make_task("sudoku", givens=givens).draw(random.Random(0))
    assert sum(c in "1234" for c in problem.prompt.removeprefix("sudoku ")) == givens


def test_wrong_names_and_numbers_are_refused():
    with pytest.raises(ValueError, match="task='chess'"):
        make_task("chess")
    with pytest.raises(ValueError, match="givens=17"):
        make_task("sudoku", givens=17)
    with pytest.raises(ValueError, match="count=0"):
        make_task("sorting").problems(0, "train", 0)
    with pytest.raises(ValueError, match="count=400: task 'sudoku'"):
        make_task("sudoku", givens=16).problems(400, "train", 0)
