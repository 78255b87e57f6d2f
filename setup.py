"""What pyproject.toml cannot say: configs, tools and the model index belong in ``mmubn/.mim``.

There MMEngine and mim look for those of an installed package. A wheel has copies of them, an editable install links to
them.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PARTS = ('configs', 'tools', 'model-index.yml')
NOT_COPIED = shutil.ignore_patterns('__pycache__', '*.py[cod]', '.*')


class BuildWithMim(build_py):
    """Adds ``mmubn/.mim`` to what is built."""

    def run(self) -> None:
        super().run()
        mim = (ROOT if self.editable_mode else Path(self.build_lib)) / 'mmubn' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)  # of an earlier build
        mim.mkdir(parents=True)
        for name in PARTS:
            if self.editable_mode:
                (mim / name).symlink_to(Path('..', '..', name))
            elif (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, mim / name, ignore=NOT_COPIED)
            else:
                shutil.copy2(ROOT / name, mim / name)
        if self.editable_mode:
            self._name_the_clone()

    def _name_the_clone(self) -> None:
        """Let openmim find an editable install, of which it knows none without help.

        It looks beside the dist-info for the first name in its top_level.txt; a path in its place leads it here.
        """
        wheel = Path(self.get_finalized_command('install').install_lib)
        for names in wheel.glob('*.dist-info/top_level.txt'):
            names.write_text(f'{ROOT / "mmubn"}\nmmubn\n')

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        mim = Path(self.build_lib, 'mmubn', '.mim')
        copies = [] if self.editable_mode else [str(path) for path in mim.rglob('*') if path.is_file()]
        return super().get_outputs(include_bytecode) + copies


setup(cmdclass={'build_py': BuildWithMim})
