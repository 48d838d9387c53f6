//! A chart of values on a logarithmic axis, a line for each row.

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

/// Width of the labels, of the values and of the notes beside them, and of the whole.
const LABELS: i32 = 230;
const VALUES: i32 = 520;
const NOTES: i32 = 130;
const WIDTH: i32 = LABELS + VALUES + NOTES;
/// Heights: above and below the rows, of a mark, and between rows.
const HEAD: i32 = 74;
const FOOT: i32 = 58;
const MARK: i32 = 13;
const GAP: i32 = 12;
/// Rows of a line's label.
const LABEL_HEIGHT: i32 = 30;
/// Average width of a character of the legend.
const LEGEND_CHARACTER: i32 = 8;
/// Share of the range that stays free at both ends of the axis.
const MARGIN: f64 = 0.06;

const FONT: &str = "sans-serif";
const TEXT: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0x66, 0x66, 0x66);
const GRID: RGBColor = RGBColor(0xe2, 0xe2, 0xe2);
const BAND: RGBColor = RGBColor(0xf6, 0xf6, 0xf6);

/// A chart.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) axis: String,
    pub(super) legend: Vec<(String, [u8; 3])>,
    /// A value with a thick line.
    pub(super) reference: Option<f64>,
    pub(super) lines: Vec<Line>,
}

/// The values of a row.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Name and parameters.
    pub(super) label: (String, String),
    pub(super) marks: Vec<Mark>,
}

/// A value, and a range around it.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub(super) value: f64,
    pub(super) range: Option<(f64, f64)>,
    pub(super) color: [u8; 3],
    /// Text at the right.
    pub(super) note: Option<String>,
}

impl Line {
    fn height(&self) -> i32 {
        (self.marks.len() as i32 * MARK).max(LABEL_HEIGHT) + GAP
    }
}

/// A logarithmic axis.
#[derive(Clone, Copy, Debug)]
struct Axis {
    /// Decimal logarithms of both ends.
    low: f64,
    high: f64,
}

impl Axis {
    /// Returns an axis with room for all values.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let logarithms = values.filter(|value| *value > 0.0).map(f64::log10);
        let (low, high) = logarithms
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            return Self { low: 0.0, high: 1.0 };
        }
        let margin = ((high - low) * MARGIN).max(0.05);
        Self { low: low - margin, high: high + margin }
    }

    /// Returns the horizontal position of a value.
    fn at(&self, value: f64) -> i32 {
        let share = (value.max(f64::MIN_POSITIVE).log10() - self.low) / (self.high - self.low);
        LABELS + (share.clamp(0.0, 1.0) * f64::from(VALUES)).round() as i32
    }

    /// Returns the values of the ticks: 1, 2 and 5 of each decade, or only 1 of many decades.
    fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = if self.high - self.low > 2.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let decades = self.low.floor() as i32..=self.high.ceil() as i32;
        decades
            .flat_map(|decade| steps.iter().map(move |step| step * 10_f64.powi(decade)))
            .filter(|tick| (self.low..=self.high).contains(&tick.log10()))
            .collect()
    }
}

impl Chart {
    /// Returns the chart as SVG, with a background of its own: it is read on any page.
    pub(super) fn draw(&self) -> Result<String> {
        let body: i32 = self.lines.iter().map(Line::height).sum();
        let height = HEAD + body + FOOT;
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
            self.draw_on(&area, HEAD + body)
                .map_err(|error| anyhow!("cannot draw {}: {error}", self.title))?;
        }
        // one element a line
        Ok(svg.trim_end().to_owned() + "\n")
    }

    fn draw_on<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
        bottom: i32,
    ) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        area.fill(&WHITE)?;
        let marks = || self.lines.iter().flat_map(|line| &line.marks);
        let ends = marks().flat_map(|mark| {
            let (low, high) = mark.range.unwrap_or((mark.value, mark.value));
            [mark.value, low, high]
        });
        let axis = Axis::of(ends.chain(self.reference));
        let text = |text: &str, (x, y): (i32, i32), size: i32, color: RGBColor, side: HPos| {
            let style = TextStyle::from((FONT, size)).color(&color).pos(Pos::new(side, VPos::Center));
            area.draw(&Text::new(text.to_owned(), (x, y), style))
        };
        let mut top = HEAD;
        for (number, line) in self.lines.iter().enumerate() {
            if number % 2 == 0 {
                let band = [(0, top), (WIDTH, top + line.height())];
                area.draw(&Rectangle::new(band, BAND.filled()))?;
            }
            top += line.height();
        }
        for tick in axis.ticks() {
            let x = axis.at(tick);
            area.draw(&PathElement::new(vec![(x, HEAD), (x, bottom)], GRID))?;
            text(&number(tick), (x, bottom + 14), 12, FAINT, HPos::Center)?;
        }
        if let Some(reference) = self.reference {
            let x = axis.at(reference);
            area.draw(&PathElement::new(vec![(x, HEAD), (x, bottom)], FAINT.stroke_width(2)))?;
        }
        text(&self.title, (14, 22), 18, TEXT, HPos::Left)?;
        text(&self.axis, (LABELS + VALUES / 2, bottom + 38), 13, FAINT, HPos::Center)?;
        let mut x = 14;
        for (name, [red, green, blue]) in &self.legend {
            area.draw(&Circle::new((x + 5, 50), 5, RGBColor(*red, *green, *blue).filled()))?;
            text(name, (x + 16, 50), 13, TEXT, HPos::Left)?;
            x += 34 + name.chars().count() as i32 * LEGEND_CHARACTER;
        }
        let mut top = HEAD;
        for line in &self.lines {
            let middle = top + line.height() / 2;
            let (name, params) = &line.label;
            let name_at = if params.is_empty() { middle } else { middle - 8 };
            text(name, (LABELS - 16, name_at), 14, TEXT, HPos::Right)?;
            text(params, (LABELS - 16, middle + 9), 12, FAINT, HPos::Right)?;
            let mut y = middle - (line.marks.len() as i32 - 1) * MARK / 2;
            for mark in &line.marks {
                let [red, green, blue] = mark.color;
                let color = RGBColor(red, green, blue);
                let (mut left, mut right) = (axis.at(mark.value), axis.at(mark.value));
                if let Some((low, high)) = mark.range {
                    let (from, to) = (axis.at(low), axis.at(high));
                    (left, right) = (left.min(from), right.max(to));
                    area.draw(&PathElement::new(vec![(from, y), (to, y)], color.stroke_width(2)))?;
                    for end in [from, to] {
                        area.draw(&PathElement::new(
                            vec![(end, y - 3), (end, y + 3)],
                            color.stroke_width(2),
                        ))?;
                    }
                }
                area.draw(&Circle::new((axis.at(mark.value), y), 4, color.filled()))?;
                if let Some(note) = &mark.note {
                    // not across the line of the reference
                    let is_below = self.reference.is_some_and(|reference| mark.value < reference);
                    if is_below && left > LABELS + NOTES {
                        text(note, (left - 10, y), 12, TEXT, HPos::Right)?;
                    } else {
                        text(note, (right + 10, y), 12, TEXT, HPos::Left)?;
                    }
                }
                y += MARK;
            }
            top += line.height();
        }
        area.present()
    }
}

/// Formats the value of a tick.
fn number(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.0} M", value / 1e6),
        value if value >= 1e3 => format!("{:.0} k", value / 1e3),
        value if value >= 1.0 => format!("{value:.0}"),
        value => {
            // one digit, as ticks have
            let digits = (-value.log10()).ceil().max(1.0) as usize;
            format!("{value:.digits$}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axis_has_room_for_all_values() {
        let axis = Axis::of([0.1, 4.0].into_iter());
        assert!(axis.at(0.1) > LABELS && axis.at(4.0) < LABELS + VALUES);
        assert!(axis.at(0.1) < axis.at(1.0) && axis.at(1.0) < axis.at(4.0));
        assert_eq!(axis.ticks().into_iter().map(number).collect::<Vec<_>>(), ["0.1", "0.2", "0.5", "1", "2"]);
    }

    #[test]
    fn many_decades_have_a_tick_each() {
        let axis = Axis::of([3_000.0, 10_000_000.0].into_iter());
        let ticks: Vec<String> = axis.ticks().into_iter().map(number).collect();
        assert_eq!(ticks, ["10 k", "100 k", "1 M", "10 M"]);
    }

    #[test]
    fn chart_without_values_is_drawn() {
        let empty = Chart {
            title: "none".to_owned(),
            axis: String::new(),
            legend: Vec::new(),
            reference: None,
            lines: Vec::new(),
        };
        assert!(empty.draw().expect("a figure").starts_with("<svg"));
    }
}
