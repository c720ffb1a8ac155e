"""No configuration runs code or reads the environment, wherever it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.exits import Exit, Stop
from conf.load import compose, main
from conf.schema import Settings
from conf.screen import screen

ROOT = "data.root=somewhere"


def never(settings: Settings) -> None:
    pytest.fail("it ran")


KEY = st.from_regex(r"[a-z]{1,4}", fullmatch=True)


@pytest.mark.parametrize(
    "override",
    [
        "+x._target_=os.system",
        "+x={a:{_target_:os.system}}",
        "+x=[{_target_:os.system}]",
        "+strategy._target_=os.system",
        "+strategy.x={_target_:os.system}",
        "+_private=1",
        "hydra.callbacks={a:{_target_:os.system}}",
        "+hydra.callbacks.a._target_=os.system",
        "hydra.launcher._target_=os.system",
        "hydra.callbacks={a:{_target_:x}},{b:{_target_:y}}",
        "hydra.searchpath=[file:///elsewhere]",
        "seed=${oc.env:HOME}",
        "run.dir=a/${oc.env:HOME}",
        "baselines=['${oc.env:HOME}']",
        "run.dir='${${run.experiment}:HOME}'",
        "run.dir='${oc.decode:1}'",
    ],
)
def test_an_override_that_could_run_or_read_something_is_refused(
    override: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["-m"] if "}," in override else []
    for attempt in (lambda: compose([ROOT, override]), lambda: main([*sweep, ROOT, override], never)):
        with pytest.raises(Stop, match=r"not accepted|only plain references") as caught:
            attempt()
        assert caught.value.exit == Exit.CONFIG


@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nhydra:\n  callbacks:\n    a:\n      _target_: os.system\n",
        '# @package hydra\ncallbacks: {a: {"\\x5ftarget_": os.system}}\n',
        "# @package _global_\nhydra:\n  searchpath: [file:///elsewhere]\n",
        "# @package _global_\nseed: ${oc.env:HOME}\n",
        "a: [",
    ],
)
def test_files_from_elsewhere_are_screened_before_hydra_reads_them(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(Stop, match=r"mine\.yaml") as caught:
        main(["--config-dir", str(tmp_path / "mine"), "+experiment=mine", ROOT], never)
    assert caught.value.exit == Exit.CONFIG


def test_an_experiment_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /strategy: fedprox\n"
        "strategy:\n  mu: 0.5\nseed: ${run.keep}\n"
    )
    jobs: list[Settings] = []
    main(["--config-dir", str(tmp_path / "mine"), "+experiment=mine", ROOT], jobs.append)
    assert jobs[0].plan.strategy.parameters == {"mu": 0.5}
    assert jobs[0].plan.seed == 2


@given(path=st.lists(st.one_of(KEY, st.integers(0, 3)), max_size=5), key=KEY)
def test_an_underscored_key_is_found_at_any_depth(path: list[str | int], key: str) -> None:
    tree: object = {f"_{key}": 1}
    for step in reversed(path):
        tree = [0] * step + [tree] if isinstance(step, int) else {step: tree}
    with pytest.raises(Stop, match=f"_{key} is not accepted"):
        screen(tree)


@given(
    st.recursive(
        st.one_of(st.integers(), KEY, st.none()), lambda inner: st.dictionaries(KEY, inner), max_leaves=8
    )
)
def test_names_and_numbers_pass(tree: object) -> None:
    screen(tree)
