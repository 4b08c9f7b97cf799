"""Chat templates come from strangers: what they can do is write text."""

from __future__ import annotations

import os
import time
from datetime import date
from pathlib import Path

import psutil
import pytest

from graft.templates import MEMORY_BYTES, Cut, Refused, Rendered, Request, Runner, TemplateFailure

DAY = date(2026, 1, 1)
MESSAGES = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]


def run(template: str) -> Rendered | Refused:
    with Runner({"default": template}, {"eos_token": "</s>"}, DAY) as runner:
        (found,) = runner.render([Request(MESSAGES, None)])
    return found


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages | attr('__class__') }}",
        "{{ cycler.__init__.__globals__.os.popen('touch MARK') }}",
        "{{ joiner }}",
        "{{ lipsum.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': messages}) }}",
        "{{ messages['__cla' ~ 'ss__'] }}",
        "{% for part in ['__class__'] %}{{ ''[part] }}{% endfor %}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ self.__dict__ }}",
        "{{ range.__self__ }}",
        "{{ dict.fromkeys.__self__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ tojson }}{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'x' %}",
    ],
)
def test_what_leads_out_of_the_sandbox_is_refused_and_has_no_effect(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateFailure) as caught:
        run(template.replace("MARK", str(tmp_path / "mark")))
    assert caught.value.code == "unsafe_template"
    assert "not safe to run" in caught.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 20000 }}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 'x' | center(2000000000) }}",
        "{% set ns = namespace(x='x') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ (10 ** 99999) ** 99999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_limits_of_time_and_memory_end_a_template_by_name(template: str) -> None:
    began = psutil.Process().cpu_times()
    with pytest.raises(TemplateFailure) as caught:
        run(template)
    assert caught.value.code == "template_timeout"
    ended = psutil.Process().cpu_times()
    assert (ended.children_user + ended.children_system) - (began.children_user + began.children_system) < 3.5


def test_the_child_may_not_hold_more_than_256_mib() -> None:
    with Runner({"default": "x"}, {}, DAY) as runner:
        assert psutil.Process(runner._child.pid).rlimit(psutil.RLIMIT_AS) == (MEMORY_BYTES, MEMORY_BYTES)
    assert MEMORY_BYTES == 256 * 1024 * 1024


def test_the_row_at_which_it_ended_is_known_and_the_process_is_gone() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}x"
    with Runner({"default": template}, {}, DAY) as runner:
        rows = [Request([{"role": "user", "content": "loop" if number == 5 else "ok"}], None) for number in range(9)]
        with pytest.raises(TemplateFailure) as caught:
            runner.render(rows)
        assert (caught.value.code, caught.value.index) == ("template_timeout", 5)
        pid = runner._child.pid
    assert not psutil.pid_exists(pid)


def test_the_child_sees_no_secret_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "sk-secret")
    with Runner({"default": "x"}, {}, DAY) as runner:
        assert not any(name.startswith("GRAFT") for name in psutil.Process(runner._child.pid).environ())


def test_what_a_template_says_against_a_conversation_is_passed_on() -> None:
    assert run("{{ raise_exception('no ' + messages[0].role) }}") == Refused("no user")
    assert run("{{ 1 / 0 }}") == Refused("division by zero")
    with pytest.raises(TemplateFailure, match="line 1") as caught:
        run("{% if %}")
    assert caught.value.code == "unsupported_chat_template"


def test_text_marks_and_cuts() -> None:
    template = (
        "{% for m in messages %}{{ m.role[0] + ':' }}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
        "{% if add_generation_prompt %}a:{% else %}{{ eos_token }}{% endif %}"
    )
    with Runner({"default": template}, {"eos_token": "</s>"}, DAY) as runner:
        (found,) = runner.render([Request(MESSAGES, None, [Cut(1, True), Cut(1, False)])])
    assert isinstance(found, Rendered)
    assert found.text == "u:Sky?;a:Blue.;</s>"
    assert [found.text[start:end] for start, end in found.marks or ()] == ["Sky?", "Blue."]
    assert found.cuts == [len("u:Sky?;a:"), "u:Sky?;</s>"]  # a number where the text begins so


def test_large_batches_and_any_characters_pass_through() -> None:
    content = "é🌧️\u2028\x01" * 20_000
    rows = [Request([{"role": "user", "content": content}], [{"big": 2**70}])] * 16
    with Runner({"default": "{{ messages[0].content }}{{ tools | tojson }}"}, {}, DAY) as runner:
        began = time.monotonic()
        found = runner.render(rows)
    assert all(isinstance(each, Rendered) and each.text == content + f'[{{"big": {2**70}}}]' for each in found)
    assert time.monotonic() - began < 60


def test_a_long_conversation_has_its_time_for_each_text() -> None:
    template = "{% for m in messages %}{{ m.content }}{% for a in range(9000) %}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x"}] * 60
    cuts = [Cut(count, False) for count in range(1, 60)]
    with Runner({"default": template}, {}, DAY) as runner:
        (found,) = runner.render([Request(messages, None, cuts)])
    assert isinstance(found, Rendered)
    assert found.cuts == list(range(1, 60))
