"""The exercises: every stub fails its grader, and our own bodies pass, each on those before it."""
import os
import shutil
import subprocess
import sys

import pytest

import exercises
from exercises import *                          # noqa: F403  the graders, on our own bodies

ROOT = os.path.join(os.path.dirname(__file__), '..')


def grade(folder):
    """{grader: whether it passes in this folder}"""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rA', '--no-header',
                           '-p', 'no:cacheprovider', 'exercises.py'], cwd=folder,
                          capture_output=True, text=True)
    lines = [line.split()[:2] for line in done.stdout.split('\n')]
    return {line[1].partition('::test_')[2]: line[0] == 'PASSED' for line in lines
            if len(line) == 2 and line[0] in ('PASSED', 'FAILED')}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('course') / 'copy'
    exercises.write(str(folder))
    return folder


def test_every_stub_fails_and_says_so(copy):
    names = [function for _, function, *_ in exercises.EXERCISES]
    assert len(names) >= 8 and grade(copy) == dict.fromkeys(names, False)
    sheet = (copy / 'EXERCISES.md').read_text()
    assert all(f'test_{name}`' in sheet for name in names)


def test_a_grader_needs_only_the_exercises_before_it(copy, tmp_path):
    """Half of them solved: these pass, though the others still raise."""
    folder = shutil.copytree(copy, tmp_path / 'half')
    todo = [(file, name) for file, name, *_ in exercises.EXERCISES][6:]
    for file in {file for file, *_ in exercises.EXERCISES}:
        with open(os.path.join(ROOT, file)) as ours:
            source = ours.read()
        left = [name for other, name in todo if other == file]
        (folder / file).write_text(exercises.emptied(source, left))
    assert [passed for passed in grade(folder).values()].count(True) == 6
    assert all(grade(folder)[name] is False for _, name in todo)


def test_no_file_of_the_copy_holds_a_solution(copy):
    for file, function, *_ in exercises.EXERCISES:
        with open(os.path.join(ROOT, file)) as ours:
            source = ours.read()
        body = set(source.split('\n')) - set(exercises.emptied(source, [function]).split('\n'))
        telling = [line for line in body if len(line.strip()) > 40]
        for name in os.listdir(copy):
            if name.endswith(('.py', '.md')):
                lines = (copy / name).read_text().split('\n')
                assert not set(telling) & set(lines), (function, name)
