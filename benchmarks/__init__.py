"""What ``fastvae bench`` and ``pytest --benchmark-only`` measure, against whom, and how; the bars, and publication.

``works`` is the table of what is measured, ``ops`` how, ``contenders`` by whom; ``timing`` and ``memory``
are the instruments, ``suite`` uses them and ``table`` prints. Installed as ``fastvae.benchmarks``; nothing here is
imported by ``import fastvae``.
"""
