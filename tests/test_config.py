"""config.py: every option on the command line, in files and in errors; presets; old runs."""

import dataclasses
import json
import math
import random
import typing
import warnings

import pytest
import torch
from conftest import ROOT
from test_data import refused

import kernels
import train
from baselines import NAMES
from config import (
    FIELDS,
    GROUPS,
    OPTIMIZERS,
    PRESETS,
    Config,
    build_parser,
    check_value,
    parse_config,
)
from data import Preprocessing
from device import choose_device
from files import UserError
from mirror_unet import TASKS
from patches import Augmentation
from predict import load_model

NAN = math.nan
# Written before three options were renamed: the names that FIELDS lacks, in the order of the file.
OLD_RUN = json.loads((ROOT / "tests" / "old_run" / "config.json").read_text())
RENAMED = dict(
    zip(
        [name for name in OLD_RUN if name not in FIELDS],
        ["negatives", "patches_per_case", "foreground_fraction"],
        strict=True,
    )
)
every_field = pytest.mark.parametrize("f", FIELDS.values(), ids=lambda f: f.name)


def type_of(f) -> type:
    """The type of a field's value, or of the values of its tuple."""
    return typing.get_args(f.type)[0] if is_tuple(f) else f.type


def is_tuple(f) -> bool:
    return typing.get_origin(f.type) is tuple


def option_of(f) -> str:
    return f"--{f.name.replace('_', '-')}"


# -------------------------------------------------------------------------------- values of fields
def random_value(f, rng: random.Random):
    """An allowed value of a field."""
    allowed, kind = f.metadata, type_of(f)
    if is_tuple(f) and allowed["choices"]:
        return tuple(rng.sample(allowed["choices"], rng.randint(0, len(allowed["choices"]))))
    if is_tuple(f):
        count = rng.randint(0, 4) if allowed["count"] is None else allowed["count"]
        values = [random_one(kind, allowed, rng) for _ in range(count)]
        return tuple(sorted(values))  # the first of a window is the smaller one
    return random_one(kind, allowed, rng)


def random_one(kind, allowed, rng: random.Random):
    if allowed["choices"]:
        return rng.choice(allowed["choices"])
    if kind is bool:
        return rng.random() < 0.5
    if kind is str:
        return rng.choice(["", "a folder/with ümlaut", "0.3", "line\nbreak"])
    low = -1e4 if allowed["low"] is None else allowed["low"]
    high = 1e4 if allowed["high"] is None else allowed["high"]
    return rng.randint(low, high) if kind is int else rng.uniform(low, high)


def beyond(f) -> list:
    """Values just outside the range of a field."""
    values = []
    for bound, direction in ((f.metadata["low"], -1), (f.metadata["high"], 1)):
        if bound is None:
            continue
        if type_of(f) is int:
            values.append(bound + direction)
        else:
            values.append(math.nextafter(bound, direction * math.inf))
    return values


def wrong_values(f) -> list:
    """Values that a field must refuse, wherever they come from."""
    kind = type_of(f)
    values = [None, {}, b"1", NAN, math.inf, -math.inf, [[1]], [None], 10**400]
    values += {
        bool: [0, 1, 1.0, "yes", []],
        int: [True, 1.0, "1", [True]],
        float: [True, "1.0", [True]],
        str: [1, 1.0, True, ["text"], []],
    }[kind]
    values += beyond(f)
    if f.metadata["choices"]:
        values += ["blur", "a\nb", 8, -1, "x" * 10**6]
    if not is_tuple(f):
        return values
    right = list(random_value(f, random.Random(0)))
    values += [5, "5", {1: 2}, range(3), [*right, *[NAN] * 24]]
    if f.metadata["count"] or f.metadata["choices"]:
        values += [right + right]
    if f.metadata["count"]:
        values += [[], right[1:], right[::-1] if f.metadata["count"] == 2 else right[:1]]
        values += [[value, *right[1:]] for value in (*beyond(f), NAN, math.inf, "1", None, True)]
    return values


@every_field
def test_a_field_is_described_and_its_default_allowed(f):
    allowed = f.metadata
    assert set(allowed) == {"help", "choices", "low", "high", "count", "was", "before"}
    if allowed["before"] is not None:
        assert check_value(f, allowed["before"]) == allowed["before"] != f.default
    assert len(allowed["help"]) > 8 or allowed["choices"]
    assert check_value(f, f.default) == f.default
    if type_of(f) in (int, float) and not allowed["choices"] and allowed["count"] != 2:
        assert allowed["low"] < allowed["high"]
    if is_tuple(f):
        any_length = allowed["count"] is None and not f.default
        assert allowed["count"] == len(f.default) or allowed["choices"] or any_length


@every_field
def test_a_field_takes_the_values_it_allows_from_files_and_from_the_command_line(f):
    rng = random.Random(f.name)
    values = [random_value(f, rng) for _ in range(20)]
    if not is_tuple(f):
        values += [v for v in (f.metadata["low"], f.metadata["high"]) if v is not None]
        values += f.metadata["choices"] or ()
    for value in values:
        value = float(value) if f.type is float else value
        c = Config.from_dict({f.name: value}, "FILE")
        assert getattr(c, f.name) == value
        if f.type is bool:
            words = [option_of(f) if value else option_of(f).replace("--", "--no-")]
        else:
            words = [option_of(f), *map(str, value if is_tuple(f) else [value])]
        given = build_parser("").parse_args(words)
        assert check_value(f, getattr(given, f.name)) == value


@every_field
def test_a_field_refuses_wrong_values_of_a_file_in_one_line_with_file_and_name(f):
    for value in wrong_values(f):
        with refused(f"FILE: option {f.name}: "):
            try:
                Config.from_dict({f.name: value}, "FILE")
            except UserError as e:
                assert len(str(e)) < 300
                raise


@every_field
def test_a_field_refuses_wrong_values_on_the_command_line_in_one_line_with_its_option(f):
    if f.type is bool:
        words = [["yes"]]
    elif f.type is str:
        words = [[], ["a", "b"], *([["blur"], ["a\nb"]] if f.metadata["choices"] else [])]
    else:
        outside = [[str(value)] for value in beyond(f)]
        words = [["x"], ["1.5.2"], ["nan"], ["inf"], ["true"], *outside]
        words += [["1.5"]] if type_of(f) is int else []
        words += [[], ["1"] * 9] if f.metadata["count"] else []
    for given in words:
        unknown = f.type in (bool, str) and given in (["yes"], ["a", "b"])
        with refused(given[-1] if unknown else option_of(f)):
            parse_config([option_of(f), *given])


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("lr", "fast", "option lr: expected a number, got 'fast'"),
        ("lr", NAN, "option lr: expected a number, got nan"),
        ("steps", True, "option steps: expected a whole number, got True"),
        ("compile", 1, "option compile: expected true or false, got 1"),
        ("root", 5, "option root: expected a text, got 5"),
        ("patch", 32, "option patch: expected a list of numbers, got 32"),
        ("patch", [32, 32], "option patch: takes 3 numbers, got 2"),
        ("patch", [10**6] * 3, "option patch: 1000000: give 1024 or less"),
        ("overlap", 0.9999999, "option overlap: 0.9999999: give 0.9 or less"),
        ("batch", 0, "option batch: 0: give 1 or more"),
        ("flip_axes", [0, 0], "option flip_axes: names a value twice: 0 0"),
        ("flip_axes", [0, 1, 2] * 8, "option flip_axes: names a value twice: 0 1 2 0 1 2"),
        ("flip_axes", [3], "option flip_axes: 3: use one of 0, 1, 2"),
        ("norm", "layer", "option norm: 'layer': use one of instance, batch"),
        ("corrupt", "blur", "option corrupt: 'blur': use one of none, noise, shuffle"),
        ("suv_window", [5, 0], "option suv_window: 5 0: the first number must be the smaller one"),
    ],
)
def test_what_is_said_about_a_wrong_value(name, value, message):
    with refused(f"run/best.pt: {message}"):
        Config.from_dict({name: value}, "run/best.pt")


def test_a_whole_number_may_stand_for_a_float():
    c = Config.from_dict({"lr": 1, "spacing": [2, 2, 3]}, "FILE")
    assert (type(c.lr), c.lr) == (float, 1.0)
    assert c.spacing == (2.0, 2.0, 3.0) and {type(s) for s in c.spacing} == {float}


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_a_config_that_is_not_a_mapping_is_refused(values):
    with refused("FILE: expected the options of a run by name, got"):
        Config.from_dict(values, "FILE")


def test_unknown_options_are_refused_by_name():
    names = {"learning_rate": 1, "lr": 1.0, 3: 4, "x" * 10**6: 0, "a\nb": 0}
    with refused("FILE: unknown options ['3', 'a\\nb', 'learning_rate', 'x", "another version?"):
        Config.from_dict(names, "FILE")
    with refused("--learning-rate", "see --help"):
        parse_config(["--learning-rate", "1"])
    with refused("'mouse'", "phantom, petct, brain, phantom-brain"):
        parse_config(["--data", "mouse"])


@pytest.mark.parametrize("seed", range(5))
def test_a_config_survives_json(seed):
    rng = random.Random(seed)
    c = Config(**{name: random_value(f, rng) for name, f in FIELDS.items()})
    assert Config.from_dict(json.loads(json.dumps(c.to_dict())), "FILE") == c


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_allowed_and_survives_json(name):
    c = parse_config(["--preset", name, "--root", "x"])
    assert {key: getattr(c, key) for key in PRESETS[name]} == PRESETS[name]
    assert all(side % 16 == 0 for side in c.patch)
    assert Config.from_dict(json.loads(json.dumps(c.to_dict())), "FILE") == c


# ------------------------------------------------------------------------------------ command line
def test_help_has_every_option_with_its_text(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"], "Train a network.")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Train a network." in text and "--preset {phantom,petct,brain,autopet,brats}" in text
    for f in FIELDS.values():
        assert f" {option_of(f)}" in text
        assert f.metadata["help"] in text, f.name


def test_options_are_grouped_in_the_order_of_the_fields():
    groups = {}
    for group in build_parser("")._action_groups:
        names = [action.dest for action in group._group_actions]
        groups[group.title] = [n for i, n in enumerate(names) if n not in names[:i]]
    assert list(groups)[-len(GROUPS) :] == list(GROUPS)
    assert {title: groups[title][0] for title in GROUPS} == GROUPS
    assert [name for title in GROUPS for name in groups[title]] == list(FIELDS)


def test_help_shows_the_values_of_the_laptop_presets():
    helps = {action.dest: action.help for action in reversed(build_parser("")._actions)}
    assert helps["lr"].endswith("(phantom 0.002, petct 0.001, brain 0.001)")
    assert helps["steps"].endswith("(phantom 700, petct 100000, brain 100000)")
    assert helps["fold"].endswith("(0)")
    assert helps["root"].endswith("the phantoms need none")  # no default to show


def test_older_names_of_options_still_work(capsys):
    assert {f.metadata["was"]: f.name for f in FIELDS.values() if f.metadata["was"]} == RENAMED
    c = parse_config("--per-case 3 --positive 0.25 --no-healthy".split())
    assert (c.patches_per_case, c.foreground_fraction, c.negatives) == (3, 0.25, False)
    assert parse_config(["--healthy"]).negatives
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    shown = capsys.readouterr().out
    assert "--per-case" not in shown and "--positive" not in shown


def test_options_win_over_the_preset():
    c = parse_config("--lr 0.5 --share 4 5 --no-channels-last --preset autopet --root x".split())
    assert (c.lr, c.share, c.channels_last, c.cubes) == (0.5, (4, 5), False, 1)
    assert parse_config(["--share"]).share == ()


@pytest.mark.parametrize(
    "words,steps,minutes",
    [
        ("", 700, 0),  # the same training however busy the machine
        ("--steps 7", 7, 0),
        ("--minutes 3", 100_000, 3),
        ("--steps 7 --minutes 3", 7, 3),
        ("--data petct --root x", 100_000, 12),
        ("--data petct --root x --steps 7", 7, 0),
        ("--data petct --root x --minutes 3", 100_000, 3),
        ("--preset autopet --root x --minutes 3", 320_000, 3),
    ],
)
def test_a_budget_in_steps_or_minutes_replaces_that_of_the_preset(words, steps, minutes):
    c = parse_config(words.split())
    assert (c.steps, c.minutes) == (steps, minutes)


@pytest.mark.parametrize("model", OPTIMIZERS)
def test_a_network_with_its_own_optimizer_gets_it_by_default(model):
    c = parse_config(["--model", model])
    assert {name: getattr(c, name) for name in OPTIMIZERS[model]} == OPTIMIZERS[model]
    assert parse_config(["--model", model, "--lr", "0.5"]).lr == 0.5


def test_the_corruption_follows_the_tasks():
    corruptions = {"v1": "shuffle", "v4": "none", "multitask": "shuffle", "pet": "none"}
    for model, corrupt in corruptions.items():
        assert parse_config(["--model", model]).corrupt == corrupt
    assert parse_config(["--model", "v1", "--corrupt", "noise"]).corrupt == "noise"


@pytest.mark.parametrize("data", ["brain", "phantom-brain"])
def test_brain_data_have_their_own_preset(data):
    c = parse_config(["--data", data, "--root", "x"])
    assert (c.data, c.model, c.task, c.corrupt) == (data, "v2", "brain", "none")
    assert (c.spacing, c.patch) == ((2.0, 2.0, 2.0), (64, 64, 64))


def test_the_papers_presets_are_its_recipes():
    c = parse_config(["--preset", "autopet", "--root", "x"])
    assert (c.data, c.model, c.channels) == ("petct", "v3", (16, 32, 64, 128, 256))
    assert (c.spacing, c.ct_window, c.suv_window) == ((2, 2, 3), (-100, 250), (0, 15))
    assert (c.patch, c.patches_per_case, c.foreground_fraction) == ((96, 96, 96), 4, 2 / 3)
    assert (c.flip, c.rotate, c.scale) == (0.5, 0.2, 0.2)
    assert (c.corrupt, c.cube, c.sigma) == ("shuffle", 16, 0.3)
    assert (c.lambda_seg, c.lambda_rec, c.lambda_cls) == (0.5, 1e-3, 1e-2)
    assert (c.optimizer, c.lr, c.weight_decay, c.schedule) == ("adam", 1e-3, 1e-5, "step")
    c = parse_config(["--preset", "brats", "--root", "x"])
    assert (c.data, c.model, c.corrupt) == ("brain", "v2", "none")
    assert (c.spacing, c.patch) == ((1, 1, 1), (224, 224, 144))


@pytest.mark.parametrize(
    "words,message",
    [
        ("--data petct", "--data petct needs --root"),
        ("--model v4 --corrupt noise", "--corrupt noise: petct v4 reconstructs no CT"),
        ("--model v2 --tasks v3", "these are options of --model joint, not of v2"),
        ("--ct-weight 1.5", "--ct-weight 1.5: give a number from 0 to 1, or learnable"),
        ("--ct-weight nan", "--ct-weight nan: give a number from 0 to 1, or learnable"),
        ("--ct-weight much", "--ct-weight much: give a number from 0 to 1, or learnable"),
        ("--ct-window 250 -100", "--ct-window 250 -100: the first number must be the smaller"),
        ("--amp fp16 --device cpu", "on CPU use --amp bf16 or off"),
        ("--amp bf16 --device cpu --patch 32 32 32", "a first side of 32"),
        ("--resume --out nowhere", "nowhere/config.json: no run to resume here"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    with refused(message):
        parse_config(words.split())


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "[1, 2]", '{"steps": "ten"}', '{"x": 1}'])
def test_a_broken_config_of_a_run_is_refused_by_its_path(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with refused(f"{tmp_path / 'config.json'}: "):
        parse_config(["--resume", "--out", str(tmp_path)])


def test_a_device_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_config([]).device == "cpu"
    with refused("--device cuda: PyTorch sees no CUDA device here; use --device cpu"):
        parse_config(["--device", "cuda"])
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with refused("--kernels triton"):
        choose_device(Config(kernels="triton"))


# ----------------------------------------------------------------------------- what a config means
def test_preprocessing_and_augmentation_have_the_options():
    c = Config(
        spacing=(1.0, 2.0, 3.0), ct_window=(0.0, 1.0), suv_window=(2.0, 3.0), flip=0.1,
        flip_axes=(1,), rotate=0.2, scale=0.3, intensity=0.4, gamma=0.5,
    )  # fmt: skip
    assert c.preprocessing == Preprocessing("petct", (1, 2, 3), "LAS", (0, 1), (2, 3))
    assert c.augmentation == Augmentation(
        flip=0.1, flip_axes=(1,), rotate=0.2, scale=0.3, intensity=0.4, gamma=0.5
    )
    brain = dataclasses.replace(c, data="brain")
    assert brain.preprocessing == Preprocessing("brain", (1, 2, 3), "RAS")


@pytest.mark.parametrize(
    "data,model,targets",
    [
        ("petct", "v3", ("seg",)),
        ("phantom", "nnunet", ("seg",)),
        ("brain", "v1", ("core", "edema")),
        ("phantom-brain", "v2", ("core", "whole", "edema")),
        ("brain", "v2-rec", ("core", "edema")),
        ("brain", "segresnet", ("core", "whole", "edema")),
    ],
)
def test_targets_are_what_is_segmented(data, model, targets):
    assert Config(data=data, model=model).targets == targets


@pytest.mark.parametrize("task", TASKS)
def test_a_network_learns_the_tasks_that_its_config_names(task):
    for model in (*TASKS[task], *NAMES[task]):
        c = Config(data=task, model=model, channels=(2, 2, 2, 2, 2), patch=(64, 64, 64))
        assert c.build_model().tasks == c.network_tasks, model
    for tasks in ("v1", "v2", "v3", "none"):
        c = Config(model="joint", tasks=tasks, channels=(2, 2, 2, 2, 2))
        assert c.build_model().tasks == c.network_tasks


def test_the_options_of_v4_and_joint_reach_their_networks():
    small = dict(channels=(2, 2, 2, 2, 2))
    assert Config(model="v4", ct_weight="0.3", **small).build_model().ct_weight == 0.3
    learnable = Config(model="v4", ct_weight="learnable", **small).build_model()
    assert learnable.ct_weight.requires_grad
    skips = {Config(model="joint", skips=s, **small).build_model().skips for s in ("pet", "both")}
    assert skips == {"pet", "both"}


@pytest.mark.parametrize(
    "words,expected",
    [
        ("", "preset phantom"),
        ("--preset brats --root DIR", "preset brats --root DIR"),
        ("--data petct --root D --lr 0.5 --no-flips", "preset petct --root D --lr 0.5 --no-flips"),
        ("--share --steps 9", "preset phantom --share --steps 9"),
    ],
)
def test_differences_are_the_options_that_give_this_config(words, expected):
    c = parse_config(words.split())
    assert c.differences() == expected
    assert parse_config(f"--{expected}".split()) == c


# ---------------------------------------------------------------------------------------- old runs
def test_the_config_of_an_old_run_is_read():
    c = Config.from_dict(OLD_RUN, "tests/old_run/config.json")
    assert (c.patches_per_case, c.foreground_fraction, c.negatives) == (2, 0.5, True)
    assert (c.model, c.channels, c.spacing) == ("v1", (1, 1, 2, 2, 2), (12.0, 12.0, 12.0))
    for name, value in OLD_RUN.items():
        found = getattr(c, RENAMED.get(name, name))
        assert (list(found) if isinstance(found, tuple) else found) == value, name


@pytest.mark.slow
def test_an_old_run_can_be_loaded_and_resumed(one_thread, tmp_path, monkeypatch):
    """A run of one step, whose config is then replaced by the old one of two steps."""
    monkeypatch.setattr(train.Run, "report", lambda *_: None)  # pictures take time
    folder = tmp_path / "run"
    old = OLD_RUN | {"out": str(folder), "cache": str(tmp_path / "cache")}
    c = Config.from_dict(old | {"steps": 1}, "FILE")
    words = [w for name, f in FIELDS.items() if name != "overwrite" for w in words_of(f, c)]
    train.main(words)
    for name in ("last.pt", "best.pt"):
        state = torch.load(folder / name, weights_only=True)
        torch.save(state | {"config": old}, folder / name)
    (folder / "config.json").write_text(json.dumps(old))

    model, loaded = load_model(folder / "best.pt")
    assert (loaded.patches_per_case, loaded.foreground_fraction, loaded.negatives) == (2, 0.5, True)
    expected = torch.load(folder / "best.pt", weights_only=True)["model"]
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    train.main(["--resume", "--out", str(folder)])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    resumed = json.loads((folder / "config.json").read_text())
    assert resumed["patches_per_case"] == 2 and "per_case" not in resumed


def words_of(f, c: Config) -> list[str]:
    """The command-line arguments that give one option its value in a config."""
    value = getattr(c, f.name)
    if isinstance(value, bool):
        return [option_of(f) if value else option_of(f).replace("--", "--no-")]
    return [option_of(f), *map(str, value if isinstance(value, tuple) else [value])]


def test_half_precision_with_a_broken_cudnn_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    for version, broken in ((90701, False), (90800, True), (91400, True), (91500, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            parse_config(["--device", "cuda", "--amp", "bf16"])
        assert [f"cuDNN {version}" in str(w.message) for w in found] == [True] * broken
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parse_config(["--device", "cuda"])


def test_options_of_the_phantom_need_the_phantom():
    assert parse_config(["--phantom-uptake", "3"]).harder == (3, 1, 0)
    for data in ("petct", "phantom-brain"):
        command = f"--data {data} --root x --phantom-uptake 3 --phantom-breathing 9"
        with pytest.raises(UserError, match="--phantom-uptake 3 --phantom-breathing 9: for --data"):
            parse_config(command.split())


def test_a_run_folder_whose_name_is_too_long_is_refused():
    with refused("cannot be written", "File name too long"):
        parse_config(["--resume", "--out", "o" * 300])
