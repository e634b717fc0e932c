"""Old names of training settings: in Python, in YAML and on the command line."""

import warnings

import pytest

from tabom.cli.arguments import parse_arguments
from tabom.training.config import TabomConfig
from tabom.training.settings import TabomSettings

OLD = {"form": "hinge", "margin": 0.25, "temperature": 0.5}
NEW = {"rank_loss": "hinge", "rank_margin": 0.25, "rank_temperature": 0.5}


def rank_settings(settings):
    return {name: getattr(settings, name) for name in NEW}


def parse(*argv):
    [settings] = parse_arguments((TabomSettings,), argv, prog="tabom train", description="", takes_recipe=True)
    return settings


def as_options(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_warns_and_sets_the_new_one(tmp_path, name):
    [new] = [new for new, value in NEW.items() if value == OLD[name]]
    expected = rank_settings(TabomSettings(**{new: OLD[name]}))
    path = tmp_path / "old.yaml"
    path.write_text(f"{name}: {OLD[name]}\n")
    for make in (
        lambda: TabomSettings(**{name: OLD[name]}),
        lambda: TabomConfig(str(tmp_path), use_cpu=True, **{name: OLD[name]}),
        lambda: parse(f"--{name}", str(OLD[name])),
        lambda: parse(f"--{name}={OLD[name]}"),
        lambda: parse("--config", str(path)),
    ):
        with pytest.warns(FutureWarning, match=rf"^{name} is now called {new}; "):
            assert rank_settings(make()) == expected


def test_new_names_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert rank_settings(TabomSettings(**NEW)) == NEW
        assert rank_settings(parse(*as_options(NEW))) == NEW


def test_the_kernels_get_the_settings_under_their_own_names(tmp_path):
    settings = TabomConfig(str(tmp_path), use_cpu=True, **NEW).loss_settings
    assert {name: settings[name] for name in OLD} == OLD


def test_the_command_line_wins_over_a_file_also_where_one_of_them_has_the_old_name(tmp_path):
    for in_file, on_command_line in (("margin", "rank_margin"), ("rank_margin", "margin")):
        path = tmp_path / "settings.yaml"
        path.write_text(f"{in_file}: 0.5\n")
        with pytest.warns(FutureWarning, match="margin is now called rank_margin"):
            assert parse("--config", str(path), f"--{on_command_line}", "0.25").rank_margin == 0.25


def test_a_setting_under_both_names_is_refused(tmp_path):
    both = {"margin": 0.25, "rank_margin": 0.25}
    path = tmp_path / "both.yaml"
    path.write_text("margin: 0.25\nrank_margin: 0.25\n")
    for make in (
        lambda: TabomSettings(**both),
        lambda: TabomConfig(str(tmp_path), use_cpu=True, **both),
        lambda: parse(*as_options(both)),
        lambda: parse("--margin", "0.25", "--rank-margin=0.25"),
        lambda: parse("--config", str(path)),
    ):
        with pytest.raises(ValueError, match=r"^margin is the old name of rank_margin, and both are given: leave"):
            make()
