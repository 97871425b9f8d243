"""A trained local model put to work: opened, run over images as a stream, exported, described.

A floor of its own, above the stages and below the command: `kmine.predict` has three ways in (a run, an ONNX file, an
export) that share these parts, which read and write files, as no stage may. Nothing here imports torch before a run's
own network is asked for, so that an ONNX file is predicted from without it.
"""
