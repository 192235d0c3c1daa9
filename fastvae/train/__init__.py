"""Training the reference models: what ``fastvae train`` runs. Nothing heavy is imported here.

``config`` says what a run computes, ``data`` reads images, ``loop`` trains, ``checkpoint`` and ``lock`` keep the
run's folder, ``plots`` and ``report`` show the result.
"""
