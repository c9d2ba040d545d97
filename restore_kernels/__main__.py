"""``python -m restore_kernels``: print what is installed here."""

from restore_kernels.info import info


def main() -> None:
    for name, value in info().items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key}: {entry}")
        else:
            print(f"{name}: {value}")


main()
