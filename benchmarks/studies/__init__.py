"""``python -m benchmarks.studies``: does teaching pay? Full data, attent and its rivals at equal measured seconds.

study     a learner, its data and a metric (:mod:`.vision`, :mod:`.language`, :mod:`.sentences`; data: :mod:`.variants`)
arm       a policy: what each step trains on (:mod:`.arms`)
grid      batch sizes x learning rates; each arm runs the sweep at the point that was best for it, on a tuning seed and
          a validation part that the sweep does not use
budget    a share of full training's seconds, 50 to 100 %; the learning rate decays over each
run       one arm, point, budget and seed (:mod:`.training`), appended to a JSON-lines file as it lands (:mod:`.record`)

What a step of each kind costs is measured first (:mod:`.costs`); an arm gets as many steps as the budget pays for,
scores, choices and forwards of rows not trained on included. Seconds are those of processor time of the process, with
one torch thread, because other work may share the machine (on a GPU: wall clock around a synchronised device).
"""
