"""The simulation of tests over seeds: equal recipes whose seeds differ fool the exchange test, and not the test over seeds."""

from bench.seeds import simulate


def test_seeds_that_differ_look_like_recipes_that_differ_only_without_the_seeds() -> None:
    models, recipes, _, inside = simulate(0.8, 3, 0.0, 60)
    assert models > 0.4 and recipes < 0.15 and inside > 0.85
    models, recipes, inside_models, inside = simulate(0.0, 5, 2.0, 20)
    assert (models, recipes, inside_models, inside) == (1, 1, 0, 0)
