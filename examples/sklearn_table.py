"""scikit-learn's estimators on tables, trained block by block: cross-validation next to linear models."""

from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from layerwise.sklearn import LayerwiseClassifier, LayerwiseRegressor


def main() -> float:
    X, y = load_breast_cancer(return_X_y=True)
    blocks = LayerwiseClassifier("sll", width=64, epochs=10, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression())
    accuracy = [cross_val_score(model, X, y, cv=3).mean() for model in (blocks, linear)]
    print(f"breast cancer: accuracy {accuracy[0]:.3f}, logistic regression {accuracy[1]:.3f}")
    X, y = load_diabetes(return_X_y=True)
    blocks = LayerwiseRegressor("local_ce", width=32, epochs=10, random_state=0)
    r2 = [cross_val_score(model, X, y, cv=3).mean() for model in (blocks, Ridge(0.1))]
    print(f"diabetes: R2 {r2[0]:.2f}, ridge regression {r2[1]:.2f}")
    return accuracy[0]


if __name__ == "__main__":
    main()
