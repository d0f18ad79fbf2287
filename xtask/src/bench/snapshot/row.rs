//! One line of the table: what was measured, of us and of the peer, and what it is to be.

use serde_json::{Value, json};

/// Numbers of one kind.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// One more.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The one in the middle; of an even number of them, the mean of the two there.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let half = sorted.len() / 2;
        let upper = *sorted.get(half)?;
        if sorted.len() % 2 == 1 {
            return Some(upper);
        }
        Some(f64::midpoint(*sorted.get(half.checked_sub(1)?)?, upper))
    }

    /// The least one.
    pub fn min(&self) -> Option<f64> {
        self.0.iter().copied().min_by(f64::total_cmp)
    }

    /// The greatest one.
    pub fn max(&self) -> Option<f64> {
        self.0.iter().copied().max_by(f64::total_cmp)
    }

    fn json(&self) -> Value {
        json!({ "median": self.median(), "min": self.min(), "max": self.max(), "values": self.0 })
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    name: String,
    unit: &'static str,
    aim: Option<f64>,
    ratio_aim: Option<f64>,
    /// What we take.
    pub ours: Series,
    /// What the peer takes.
    pub peer: Series,
}

impl Row {
    /// A line with nothing measured yet.
    pub fn new(name: impl Into<String>, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            unit,
            aim: None,
            ratio_aim: None,
            ours: Series::default(),
            peer: Series::default(),
        }
    }

    /// What our median is not to exceed.
    #[must_use]
    pub fn at_most(mut self, aim: f64) -> Self {
        self.aim = Some(aim);
        self
    }

    /// Which part of the peer's it is not to exceed.
    #[must_use]
    pub fn at_most_of_peer(mut self, ratio: f64) -> Self {
        self.ratio_aim = Some(ratio);
        self
    }

    /// One round's.
    pub fn push(&mut self, ours: f64, peer: Option<f64>) {
        self.ours.push(ours);
        if let Some(peer) = peer {
            self.peer.push(peer);
        }
    }

    /// Forgets what was measured so far.
    pub fn forget(&mut self) {
        self.ours = Series::default();
        self.peer = Series::default();
    }

    /// Ours to the peer's: the median of the rounds' ratios, for what disturbs a round disturbs both. Where there are not
    /// as many of both, the medians' ratio.
    pub fn ratio(&self) -> Option<f64> {
        let (ours, peer) = (&self.ours.0, &self.peer.0);
        if ours.len() != peer.len() {
            return Some(self.ours.median()? / self.peer.median()?);
        }
        Series(
            ours.iter()
                .zip(peer)
                .map(|(ours, peer)| ours / peer)
                .collect(),
        )
        .median()
    }

    /// Whether all aims that could be checked are met; none if there was none.
    pub fn is_met(&self) -> Option<bool> {
        let at_most = |value: Option<f64>, aim: Option<f64>| Some(value? <= aim?);
        let absolute = at_most(self.ours.median(), self.aim);
        let relative = at_most(self.ratio(), self.ratio_aim);
        match (absolute, relative) {
            (Some(one), Some(other)) => Some(one && other),
            (one, other) => one.or(other),
        }
    }

    /// What the columns are called.
    pub const HEAD: &str = "| | unit | median | min | max | aim | Firecracker, median | min | max | ratio | aim | met |\n\
        |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|";

    /// The line, in Markdown.
    pub fn line(&self) -> String {
        let limit = |aim: Option<f64>| aim.map_or_else(|| "–".to_owned(), |aim| format!("≤ {aim}"));
        let mut cells = vec![self.name.clone(), self.unit.to_owned()];
        let figures = |series: &Series| [series.median(), series.min(), series.max()].map(number);
        cells.extend(figures(&self.ours));
        cells.push(limit(self.aim));
        cells.extend(figures(&self.peer));
        cells.extend([number(self.ratio()), limit(self.ratio_aim)]);
        let met = self.is_met();
        cells.push(
            met.map_or("–", |met| if met { "yes" } else { "no" })
                .to_owned(),
        );
        format!("| {} |", cells.join(" | "))
    }

    /// All of it, the rounds' numbers included.
    pub fn json(&self) -> Value {
        let peer = self.peer.median().map(|_| self.peer.json());
        json!({
            "name": self.name,
            "unit": self.unit,
            "aim": self.aim,
            "ratio_aim": self.ratio_aim,
            "ours": self.ours.json(),
            "firecracker": peer,
            "ratio": self.ratio(),
            "met": self.is_met(),
        })
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Series(vec![3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(Series(vec![4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(Series::default().median(), None);
    }

    #[test]
    fn an_aim_is_met_when_both_parts_are() {
        let mut row = Row::new("x", "ms").at_most(2.0).at_most_of_peer(0.5);
        assert_eq!(row.is_met(), None);
        row.push(1.0, Some(4.0));
        assert_eq!((row.ratio(), row.is_met()), (Some(0.25), Some(true)));
        row.push(2.0, Some(2.0));
        // The ratio's median is 0.625, that of the medians would be 0.5.
        assert_eq!(row.is_met(), Some(false));
        let alone = Row::new("x", "ms").at_most(0.5);
        assert_eq!(alone.is_met(), None);
        let mut alone = alone;
        alone.push(0.5, None);
        assert_eq!((alone.ratio(), alone.is_met()), (None, Some(true)));
    }

    #[test]
    fn a_line_has_a_cell_for_each_column() {
        let columns = |line: &str| line.matches('|').count();
        let head = Row::HEAD.lines().next().unwrap();
        assert_eq!(columns(&Row::new("x", "ms").line()), columns(head));
    }
}
