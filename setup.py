from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version: dict = {}
exec((here / 'mmubn' / 'version.py').read_text(), version)

# No torch, mmcv or mmdet in install_requires: pip would answer a range that it cannot meet by replacing the build that
# the user's machine was set up with. `import mmubn` checks the versions instead and says what to install.
setup(
    name='mmubn',
    version=version['__version__'],
    description='Unified Batch Normalization for MMDetection and MMPretrain',
    long_description=(here / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmubn', 'mmubn.*']),
    package_data={'mmubn.kernels': ['*.cpp']},  # compiled at its first use, for the machine that runs it
    python_requires='>=3.10',
    install_requires=[],
    extras_require={
        'demo': ['scikit-learn', 'pycocotools', 'matplotlib', 'pillow', 'tqdm'],
        'test': ['pytest', 'pytest-timeout', 'pytest-xdist', 'scikit-learn', 'onnx', 'onnxscript', 'onnxruntime'],
        'lint': ['ruff', 'codespell'],
    },
)
