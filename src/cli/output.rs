//! stdout and stderr: one place where results and everything else part ways.
//!
//! Invariant: a reader that has gone away (`annulus export | head`) ends the command quietly.

use std::io::{self, BufWriter, IsTerminal, Write};

use serde::Serialize;

/// Says something that is no result.
pub(crate) fn complain(message: &str) {
    // With stderr gone there is nobody left to tell.
    let _ = writeln!(io::stderr(), "annulus: {message}");
}

/// Where results go.
pub(crate) struct Output {
    writer: BufWriter<io::Stdout>,
    terminal: bool,
}

impl Output {
    /// The process's stdout.
    pub(crate) fn stdout() -> Output {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        Output { writer: BufWriter::with_capacity(64 << 10, stdout), terminal }
    }

    /// Whether a person is looking.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Prints one JSON document on a line of its own.
    pub(crate) fn json(&mut self, document: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.writer, document)?;
        self.writer.write_all(b"\n")
    }

    /// Prints a table: columns as wide as their widest cell, the last one open-ended.
    pub(crate) fn table(&mut self, header: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
            widest.max(header[column].chars().count())
        };
        let widths: Vec<usize> = (0..header.len()).map(width).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded: Vec<String> =
                cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            padded.join("  ").trim_end().to_owned()
        };
        writeln!(self.writer, "{}", line(&mut header.iter().copied()))?;
        for row in rows {
            writeln!(self.writer, "{}", line(&mut row.iter().map(String::as_str)))?;
        }
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Ends a command whose output may fail: a reader that has gone is no failure.
pub(crate) fn finish(mut output: Output, written: io::Result<()>) -> Result<(), super::Failure> {
    match written.and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let message = format!("cannot write the result: {error}");
            Err(super::Failure::new(super::Exit::Usage, message))
        }
        _ => Ok(()),
    }
}
