"""Make the base of the demo again, in minutes on one core: `python -m simmerge_ray.research.zoo.make_base OUT`."""

import sys


def make_base() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m simmerge_ray.research.zoo.make_base OUT")
    from simmerge_ray.research.zoo.recipe import BASE_RECIPE
    from simmerge_ray.research.zoo.training import train_base

    def show(step: int, num_steps: int) -> None:
        if step % 50 == 0 or step == num_steps:
            print(f"step {step} of {num_steps}", flush=True)

    print(f"base in {train_base(BASE_RECIPE, sys.argv[1], show)}")


if __name__ == "__main__":
    make_base()
