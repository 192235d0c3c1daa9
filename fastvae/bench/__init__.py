"""What ``fastvae bench`` and ``pytest benchmarks`` measure, against whom, and how.

``works`` is the table of what is measured, ``contenders`` who does it, ``timing``, ``memory`` and ``bandwidth`` are
the instruments, ``suite`` uses them and ``table`` prints. Nothing here is imported by ``import fastvae``.
"""
