//! What kind of cluster a case is done to.

/// Who decides in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Shape {
    /// Two balancers and a witness.
    Three,
    /// Two balancers alone, of which the survivor goes on.
    Pair,
    /// Two balancers alone, of which the survivor waits for an operator, or for its peer.
    PairSafety,
}

impl Shape {
    /// All of them, in the order in which they are played and printed.
    pub const ALL: [Shape; 3] = [Shape::Three, Shape::Pair, Shape::PairSafety];

    /// The word for it on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Three => "three",
            Shape::Pair => "pair",
            Shape::PairSafety => "pair-safety",
        }
    }

    /// The kind called `name`.
    pub fn named(name: &str) -> Option<Shape> {
        Shape::ALL.into_iter().find(|s| s.name() == name)
    }

    /// What node files say of it, where it is a pair.
    pub fn policy(self) -> Option<&'static str> {
        match self {
            Shape::Three => None,
            Shape::Pair => Some("availability"),
            Shape::PairSafety => Some("safety"),
        }
    }

    /// How many vote.
    pub fn voters(self) -> usize {
        if self.policy().is_some() { 2 } else { 3 }
    }
}
