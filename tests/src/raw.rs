//! A client of bytes: sends what it is told to, right or wrong, and reads what comes back.
//!
//! Invariant: what it reads is checked like a good client would; what it sends is not.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use annulus_engine::model::{NamespaceId, Token};
use annulus_net::wire::frame::{HEADER_SIZE, REPLY};
use annulus_net::wire::hello::{Hello, Welcome};
use annulus_net::wire::operation::{Get, Operation, Put, WriteOptions};
use annulus_net::wire::request::Outgoing;
use annulus_net::wire::response::decode_failure;
use annulus_net::wire::slices::{FrameWriter, Head};
use annulus_net::wire::{FrameHeader, Level, Opcode, OperationFlags, Status, Ttl};

/// A frame that came.
#[derive(Clone, Debug)]
pub struct Got {
    /// Its header.
    pub header: FrameHeader,
    /// Its body.
    pub body: Vec<u8>,
}

impl Got {
    /// The status of the reply.
    #[must_use]
    pub fn status(&self) -> Status {
        self.header.status()
    }

    /// What an error says.
    #[must_use]
    pub fn message(&self) -> String {
        decode_failure(self.status(), &self.body)
            .map_or_else(|error| error.to_string(), |failure| failure.message.to_owned())
    }

    /// Whether it is the server's farewell.
    #[must_use]
    pub fn is_close(&self) -> bool {
        self.header.opcode == Opcode::Close.reply()
    }
}

/// One connection.
#[derive(Debug)]
pub struct Raw {
    /// The socket, for those who need it.
    pub stream: TcpStream,
    writer: FrameWriter,
    received: u64,
}

impl Raw {
    /// Connects, and says nothing.
    ///
    /// # Errors
    /// What the system says.
    pub fn connect(address: SocketAddr) -> io::Result<Raw> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        Ok(Raw { stream, writer: FrameWriter::default(), received: 0 })
    }

    /// Lets the system take little on its behalf while nobody reads.
    pub fn shrink_receive_buffer(&self) {
        use std::os::fd::AsRawFd as _;
        let bytes: libc::c_int = 4096;
        let size = libc::socklen_t::try_from(size_of_val(&bytes)).expect("four bytes");
        // SAFETY: an open socket, and a readable number of the size given.
        let set = unsafe {
            let option = (&raw const bytes).cast();
            let socket = self.stream.as_raw_fd();
            libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, option, size)
        };
        assert_eq!(set, 0, "a receive buffer may be small");
    }

    /// Connects and greets.
    ///
    /// # Errors
    /// What the system says, or that the answer is no welcome.
    pub fn greeted(address: SocketAddr, hello: &Hello<'_>) -> io::Result<(Raw, Welcome)> {
        let mut raw = Raw::connect(address)?;
        raw.send(0, &Outgoing::Hello(*hello))?;
        let got = raw.frame()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let welcome = Welcome::decode(&got.body).map_err(io::Error::other)?;
        Ok((raw, welcome))
    }

    /// The frames of a request, as a good client would send them next.
    pub fn frames(&mut self, request_id: u32, request: &Outgoing<'_>) -> Vec<u8> {
        self.frames_of(
            Head {
                request_id,
                time_or_window: 15_000_000,
                opcode: request.opcode().request(),
                ..Head::default()
            },
            &|body| request.encode(body),
        )
    }

    /// The frames of a message with this head.
    pub fn frames_of(&mut self, head: Head, fill: &dyn Fn(&mut Vec<u8>)) -> Vec<u8> {
        let (mut out, mut body) = (Vec::new(), Vec::new());
        fill(&mut body);
        self.writer.owned_message(&mut out, head, body);
        self.writer.flush_slices(&mut out, usize::MAX);
        out
    }

    /// Sends a request.
    ///
    /// # Errors
    /// What the system says.
    pub fn send(&mut self, request_id: u32, request: &Outgoing<'_>) -> io::Result<()> {
        let bytes = self.frames(request_id, request);
        self.stream.write_all(&bytes)
    }

    /// Reads a frame; `None` when the server has closed.
    ///
    /// # Errors
    /// What the system says, or that what came is no frame.
    pub fn frame(&mut self) -> io::Result<Option<Got>> {
        let mut head = [0; HEADER_SIZE];
        match self.stream.read(&mut head) {
            Ok(0) => return Ok(None),
            Ok(read) => self.stream.read_exact(&mut head[read..])?,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error),
        }
        let header = FrameHeader::decode(&head, self.received).map_err(io::Error::other)?;
        assert_ne!(header.opcode & REPLY, 0, "a server sends replies");
        let mut body = vec![0; header.body_size as usize];
        self.stream.read_exact(&mut body)?;
        self.received += header.frame_size() as u64;
        Ok(Some(Got { header, body }))
    }

    /// Reads to the end, which the server must make, and gives its farewell, if there was one.
    ///
    /// # Errors
    /// What the system says, or that what came is no frame.
    pub fn farewell(&mut self) -> io::Result<Option<Got>> {
        let mut farewell = None;
        while let Some(got) = self.frame()? {
            if got.is_close() {
                farewell = Some(got);
            }
        }
        Ok(farewell)
    }
}

/// A get of the default namespace.
#[must_use]
pub fn get(key: &[u8]) -> Outgoing<'_> {
    Outgoing::Operation(Operation::Get(Get {
        token: Token(0),
        namespace: NamespaceId(0),
        key,
        level: Level::Default,
        primary: Level::Default,
        max_staleness_ms: 0,
        flags: OperationFlags::default(),
    }))
}

/// A put in the default namespace.
#[must_use]
pub fn put<'a>(key: &'a [u8], value: &'a [u8]) -> Outgoing<'a> {
    Outgoing::Operation(Operation::Put(Put {
        token: Token(0),
        namespace: NamespaceId(0),
        key,
        value: value.into(),
        ttl: Ttl::Default,
        options: WriteOptions::default(),
    }))
}
