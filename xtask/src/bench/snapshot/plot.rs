//! A plot as SVG: time against memory size.

use std::fmt::{Error, Write};

/// One contestant's.
pub struct Curve {
    /// Its name.
    pub name: &'static str,
    /// By size.
    pub points: Vec<Point>,
}

/// One size.
pub struct Point {
    /// The size.
    pub mib: u32,
    /// In milliseconds.
    pub median: f64,
    /// The least of them.
    pub min: f64,
    /// The greatest of them.
    pub max: f64,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 48.0;
/// Told apart also without seeing colours: the first is darker.
const COLOURS: [&str; 2] = ["#0b5394", "#e69138"];

/// Draws `curves`: medians as lines, from the least to the greatest as bars, which end where one of them would make the rest
/// small. The sizes are on a logarithmic axis, and the times begin at nothing.
///
/// # Errors
/// Never: writing to a string does not fail.
pub fn draw(title: &str, curves: &[Curve]) -> Result<String, Error> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let sizes = || points().map(|point| f64::from(point.mib).log2());
    let (first, last) = (
        sizes().fold(f64::MAX, f64::min),
        sizes().fold(0.0, f64::max),
    );
    let longest = points().map(|point| point.median).fold(1.0, f64::max) * 1.5;
    let step = grid(longest);
    let top = (longest / step).ceil() * step;
    let x = |mib: u32| {
        let part = (f64::from(mib).log2() - first) / (last - first).max(1.0);
        LEFT + part * (WIDTH - LEFT - RIGHT)
    };
    let y = |time: f64| HEIGHT - BOTTOM - time / top * (HEIGHT - TOP - BOTTOM);

    let mut svg = String::new();
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#fff"/>
<text x="{LEFT}" y="20" font-size="14">{title}</text>"##
    )?;
    let right = WIDTH - RIGHT;
    let mut time = 0.0;
    while time <= top {
        let at = y(time);
        writeln!(
            svg,
            r##"<path d="M{LEFT} {at:.1}H{right}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{time}</text>"##,
            LEFT - 6.0,
            at + 4.0
        )?;
        time += step;
    }
    let mut marks: Vec<u32> = points().map(|point| point.mib).collect();
    marks.sort_unstable();
    marks.dedup();
    for mib in marks {
        let (at, below) = (x(mib), HEIGHT - BOTTOM + 18.0);
        writeln!(
            svg,
            r#"<text x="{at:.1}" y="{below:.1}" text-anchor="middle">{mib}</text>"#
        )?;
    }
    writeln!(
        svg,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">guest memory, MiB</text>
<text transform="translate(16 {:.1}) rotate(-90)" text-anchor="middle">ms, median and range</text>"#,
        f64::midpoint(LEFT, right),
        HEIGHT - 10.0,
        f64::midpoint(TOP, HEIGHT - BOTTOM)
    )?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let mut line = String::new();
        for point in &curve.points {
            let (at, median) = (x(point.mib), y(point.median));
            let (min, max) = (y(point.min), y(point.max.min(top)));
            let letter = if line.is_empty() { 'M' } else { 'L' };
            write!(line, "{letter}{at:.1} {median:.1}")?;
            writeln!(
                svg,
                r#"<path d="M{at:.1} {min:.1}V{max:.1}" stroke="{colour}" stroke-opacity="0.4"/><circle cx="{at:.1}" cy="{median:.1}" r="3" fill="{colour}"/>"#
            )?;
        }
        writeln!(
            svg,
            r#"<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"/>"#
        )?;
        if let Some(last) = curve.points.last() {
            let (beside, at) = (x(last.mib) + 8.0, y(last.median) + 4.0);
            writeln!(
                svg,
                r#"<text x="{beside:.1}" y="{at:.1}" fill="{colour}">{}</text>"#,
                curve.name
            )?;
        }
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// How far apart lines are: 1, 2 or 5 of a power of ten, at most eight of them up to `longest`.
fn grid(longest: f64) -> f64 {
    let power = 10f64.powf(longest.log10().floor() - 1.0);
    let steps = [1.0, 2.0, 5.0, 10.0, 20.0].map(|step| step * power);
    let fits = steps.into_iter().find(|step| longest / step <= 8.0);
    fits.unwrap_or(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_grid_are_round_and_few() {
        assert!((grid(3.1) - 0.5).abs() < 1e-9);
        assert!((grid(12.0) - 2.0).abs() < 1e-9);
        assert!((grid(80.0) - 10.0).abs() < 1e-9);
    }

    #[test]
    fn a_curve_goes_through_its_points() {
        let point = |mib, median| Point {
            mib,
            median,
            min: median,
            max: median,
        };
        let curve = Curve {
            name: "x",
            points: vec![point(128, 5.0), point(512, 10.0)],
        };
        let svg = draw("t", &[curve]).unwrap();
        // From the left to the right edge; 5 and 10 of the 16 that the axis goes to.
        assert!(svg.contains(r#"d="M56.0 225.8L520.0 139.5""#), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }
}
