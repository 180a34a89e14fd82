//! One self-contained HTML page of a run: latency by percentile, and latency and throughput over
//! time. Inline SVG, no script, nothing fetched.

use std::fmt::Write as _;

use crate::report::{Report, Summary};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 80.0;
const BOTTOM: f64 = 40.0;
const COLOURS: [&str; 4] = ["#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f"];

/// A line of a plot: its name and its points.
type Line<'a> = (&'a str, Vec<(f64, f64)>);

/// How a plot's axes are labelled.
struct Axes<'a> {
    title: &'a str,
    x_label: &'a str,
    y_label: &'a str,
    /// Places on the x axis and their names; none: six round numbers.
    x_marks: Vec<(f64, String)>,
    logarithmic: bool,
}

fn plot(axes: &Axes<'_>, lines: &[Line<'_>]) -> String {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let x_max = points().map(|point| point.0).fold(1e-9, f64::max);
    let y_max = points().map(|point| point.1).fold(1e-9, f64::max) * 1.05;
    let y_min = if axes.logarithmic {
        points().map(|point| point.1).filter(|y| *y > 0.0).fold(y_max, f64::min) * 0.9
    } else {
        0.0
    };
    let x_of = |x: f64| LEFT + x / x_max * (WIDTH - LEFT - 20.0);
    let y_of = |y: f64| {
        let part = if axes.logarithmic {
            (y.max(y_min) / y_min).ln() / (y_max / y_min).ln().max(1e-9)
        } else {
            y / y_max
        };
        HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - 20.0)
    };
    let mut svg = format!(
        "<h2>{}</h2><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><g class=\"axis\">",
        axes.title
    );
    for step in 0..=5 {
        let part = f64::from(step) / 5.0;
        let y = if axes.logarithmic { y_min * (y_max / y_min).powf(part) } else { y_max * part };
        let at = y_of(y);
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - 20.0,
            LEFT - 6.0,
            at + 4.0,
            number(y)
        );
    }
    let marks = if axes.x_marks.is_empty() {
        (0..=5).map(|i| x_max * f64::from(i) / 5.0).map(|x| (x, number(x))).collect()
    } else {
        axes.x_marks.clone()
    };
    for (x, label) in marks {
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            x_of(x),
            HEIGHT - BOTTOM + 16.0
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text><text x=\"6\" y=\"12\">{}</text></g>",
        WIDTH / 2.0,
        HEIGHT - 4.0,
        axes.x_label,
        axes.y_label
    );
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let path: Vec<String> =
            points.iter().map(|(x, y)| format!("{:.1},{:.1}", x_of(*x), y_of(*y))).collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" points=\"{}\"/><text x=\"{}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            path.join(" "),
            LEFT + 14.0,
            28 + 16 * index
        );
    }
    svg.push_str("</svg>");
    svg
}

fn number(x: f64) -> String {
    match x {
        x if x >= 1e6 => format!("{:.1}M", x / 1e6),
        x if x >= 1e4 => format!("{:.0}k", x / 1e3),
        x if x >= 10.0 => format!("{x:.0}"),
        x => format!("{x:.2}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The page.
#[must_use]
pub fn render(report: &Report, summary: &Summary) -> String {
    let by_percentile = |histogram: &hdrhistogram::Histogram<u64>| {
        histogram
            .iter_quantiles(10)
            .filter(|value| value.quantile_iterated_to() < 1.0)
            .map(|value| {
                let nines = -(1.0 - value.quantile_iterated_to()).log10();
                (nines, value.value_iterated_to() as f64 / 1000.0)
            })
            .collect::<Vec<_>>()
    };
    let kinds = [("reads", &report.reads), ("writes", &report.writes), ("scans", &report.scans)];
    let percentiles: Vec<Line<'_>> = kinds
        .into_iter()
        .filter(|(_, histogram)| !histogram.is_empty())
        .map(|(name, histogram)| (name, by_percentile(histogram)))
        .collect();
    let seconds = Report::step_seconds();
    let over_time = |value: &dyn Fn(&hdrhistogram::Histogram<u64>) -> f64| {
        let steps = report.steps.iter().enumerate();
        steps.map(|(i, step)| (i as f64 * seconds, value(&step.latency))).collect::<Vec<_>>()
    };
    let quantile =
        |q: f64| move |h: &hdrhistogram::Histogram<u64>| h.value_at_quantile(q) as f64 / 1e3;
    let marks =
        [(0.0, "0"), (0.301, "50"), (1.0, "90"), (2.0, "99"), (3.0, "99.9"), (4.0, "99.99")];
    let plots = [
        plot(
            &Axes {
                title: "Latency by percentile",
                x_label: "percentile",
                y_label: "microseconds, log scale",
                x_marks: marks.map(|(x, label)| (x, label.to_owned())).to_vec(),
                logarithmic: true,
            },
            &percentiles,
        ),
        plot(
            &Axes {
                title: "Latency over time",
                x_label: "seconds",
                y_label: "microseconds, log scale",
                x_marks: Vec::new(),
                logarithmic: true,
            },
            &[
                ("p50", over_time(&quantile(0.5))),
                ("p99", over_time(&quantile(0.99))),
                ("max", over_time(&|h| h.max() as f64 / 1e3)),
            ],
        ),
        plot(
            &Axes {
                title: "Throughput over time",
                x_label: "seconds",
                y_label: "operations a second",
                x_marks: Vec::new(),
                logarithmic: false,
            },
            &[("all", over_time(&|h| h.len() as f64 / seconds))],
        ),
    ];
    let json = serde_json::to_string_pretty(summary).unwrap_or_default();
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>annulus-bench {title}</title>\
         <style>body{{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}}\
         svg{{width:100%;font-size:12px}}.axis line{{stroke:#ddd}}.axis text{{fill:#555}}\
         pre{{background:#f6f6f6;padding:1em;overflow:auto}}</style>\
         <h1>{title}</h1><p>{ops} operations in {seconds:.1} s: {throughput:.0} a second; p50 {p50:.1} us, \
         p99 {p99:.1} us, p99.9 {p999:.1} us, max {max:.0} us; {errors} errors.</p>{plots}<h2>Figures</h2><pre>{json}</pre></html>\n",
        title = escape(&format!("{} on {}", summary.workload, summary.target)),
        ops = summary.ops,
        seconds = summary.seconds,
        throughput = summary.throughput_ops,
        p50 = summary.latency_us.p50,
        p99 = summary.latency_us.p99,
        p999 = summary.latency_us.p999,
        max = summary.latency_us.max,
        errors = summary.errors,
        plots = plots.join(""),
        json = escape(&json),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Kind;
    use std::time::{Duration, Instant};

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a report is about wall-clock instants")]
    fn the_page_is_whole_and_escapes_what_it_is_told() {
        let (mut report, begin) = (Report::default(), Instant::now());
        report.begin(begin);
        for i in 0..2000 {
            let at = begin + Duration::from_millis(i);
            report.done(Kind::Read, Duration::from_micros(50 + i % 90), at, true);
        }
        report.end(begin + Duration::from_secs(2));
        let page = render(&report, &report.summary("<b>", "get"));
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        assert!(page.contains("get on &lt;b&gt;") && !page.contains("<b>"));
        assert_eq!(page.matches("<svg").count(), 3);
        assert!(!page.contains("NaN") && !page.contains("http"), "nothing undefined or fetched");
    }
}
