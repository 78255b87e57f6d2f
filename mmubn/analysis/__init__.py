"""What the tools compute and draw. Import each module by itself: this one imports nothing.

- :mod:`~mmubn.analysis.benchmark`: time and memory of norm layers; needs torch alone.
- :mod:`~mmubn.analysis.gpu_check`: whether the layers are right and fast on a GPU; needs torch, Triton and pytest.
- :mod:`~mmubn.analysis.launches`: how many kernels a layer launches on a GPU; needs torch alone.
- :mod:`~mmubn.analysis.machine_code`: the machine code of the GPU kernels; needs torch with Triton.
- :mod:`~mmubn.analysis.config_launches`: what the norms of a config launch on a GPU; needs OpenMMLab and Triton.
- :mod:`~mmubn.analysis.kernel_cache`: those kernels compiled before a run; needs torch with Triton.
- :mod:`~mmubn.analysis.runs`: what runs left in their work dirs.
- :mod:`~mmubn.analysis.metrics`: in which units metrics are.
- :mod:`~mmubn.analysis.curves`: curves of runs, a quantity on each axis.
- :mod:`~mmubn.analysis.sweeps`: sweep files.
- :mod:`~mmubn.analysis.sweep_norms`: norms that are compared in sweeps alone: other gates, random kernels.
- :mod:`~mmubn.analysis.comparison`: the runs of a sweep compared.
- :mod:`~mmubn.analysis.cost`: what the choices of a sweep cost.
- :mod:`~mmubn.analysis.trained`: the runner of a run that is done.
- :mod:`~mmubn.analysis.condensation`: how condensed the features of runs are.
- :mod:`~mmubn.analysis.predictions`: what a run's last checkpoint predicts.
- :mod:`~mmubn.analysis.demo`: where the demos put their results.
- :mod:`~mmubn.analysis.classification_demo`: what tools/demo_classification.py shows.
- :mod:`~mmubn.analysis.plots`: what all plots share.
- :mod:`~mmubn.analysis.outputs`: files that are written whole or not at all; needs no other package.
"""
