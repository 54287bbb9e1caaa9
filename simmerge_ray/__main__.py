"""`python -m simmerge_ray`: the same as `simmerge`."""

from simmerge_ray.cli.app import main

main()
