"""Write the table of the benchmark: breast cancer, 569 rows of 30 numbers and two classes, out of scikit-learn."""

import csv
from pathlib import Path

from sklearn.datasets import load_breast_cancer

PLACE = Path(__file__).parent / "data" / "breast_cancer.csv"


def main() -> None:
    """Write the CSV file."""
    found = load_breast_cancer()
    PLACE.parent.mkdir(exist_ok=True)
    with PLACE.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*found.feature_names, "label"])
        for numbers, label in zip(found.data.tolist(), found.target, strict=True):
            rows.writerow([*numbers, found.target_names[label]])


if __name__ == "__main__":
    main()
